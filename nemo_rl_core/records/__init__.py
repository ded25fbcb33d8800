"""Data that one stage hands to the next: messages, completions, rollouts, batches, the state of a run."""
