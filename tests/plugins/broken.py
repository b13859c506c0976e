"""Fails while it is imported."""

raise_at_import = 1 / 0
