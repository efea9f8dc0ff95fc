"""Tokens per second and peak memory of a training step, beside what else there is, on the same shapes."""
