"""Attacks on text-to-image diffusion models."""
