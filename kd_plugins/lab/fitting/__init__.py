"""Which recipes fit a student and a teacher: tried by the checks that a run does, without data and training."""
