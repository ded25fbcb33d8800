"""Training: set-up, the run loop, checkpoints, and the record of a run."""
