"""Files that a run keeps: checkpoints, the exported model, the run folder."""
