"""A run: batches, loss, steps, the launcher, checkpoints, the step log, held-out rows, the plan."""
