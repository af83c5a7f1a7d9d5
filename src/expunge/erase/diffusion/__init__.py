"""Erasers of text-to-image diffusion models."""
