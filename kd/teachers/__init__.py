"""Teachers: sources of the training signal."""
