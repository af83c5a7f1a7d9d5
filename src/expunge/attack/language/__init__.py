"""Attacks on language models: one file for each method."""
