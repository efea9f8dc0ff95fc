"""Sources of the training signal."""
