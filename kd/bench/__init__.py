"""Benchmark of a training step: tokens per second and peak memory, beside other libraries on the same shapes."""
