"""The loss of a step: the teacher's target, what is kept of it, how student and target are compared."""
