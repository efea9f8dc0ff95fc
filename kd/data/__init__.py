"""Text to rows of tokens to batches."""
