"""Optimisers that keep state only for entries that may move."""
