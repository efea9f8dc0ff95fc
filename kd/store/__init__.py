"""Teacher logits on disk or under a URL."""
