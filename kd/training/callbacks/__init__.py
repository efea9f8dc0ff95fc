"""Callbacks of a run: what stands around its steps. Lightning calls them in the order of the list."""
