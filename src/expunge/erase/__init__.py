"""Erasers by model family, one file a method; each returns an :class:`~expunge.edit.Edit`."""
