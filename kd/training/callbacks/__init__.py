"""Callbacks of a run: all work around its steps. Lightning calls them in the order of the list."""
