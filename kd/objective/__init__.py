"""Loss of a step: the teacher's target, its truncation, and the comparison of student and target."""
