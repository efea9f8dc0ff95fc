"""Conversion of text to rows of tokens, and of rows to batches."""
