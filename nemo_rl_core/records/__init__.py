"""What is handed from one stage to the next: messages, completions, rollouts, batches, the state of a run."""
