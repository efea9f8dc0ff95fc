"""Metrics on held-out data and on generated responses."""
