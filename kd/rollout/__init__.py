"""Rollouts: text that student or teacher generates during training."""
