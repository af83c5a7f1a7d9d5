"""Erasers for language models: one file for each method."""
