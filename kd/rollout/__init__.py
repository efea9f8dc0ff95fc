"""Text that student or teacher writes during training."""
