"""The training step, its schedules and its checkpoints."""
