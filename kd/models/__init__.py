"""Hugging Face causal language models, their optimizers and costs."""
