"""Shrink: remove structures, so that a model is really smaller."""
