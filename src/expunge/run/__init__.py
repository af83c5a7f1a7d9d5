"""Running things more than once: recorded claims, the status of the catalogue."""
