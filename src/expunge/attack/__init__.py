"""Attacks by model family, one file each; each tries to bring a concept back under a budget."""
