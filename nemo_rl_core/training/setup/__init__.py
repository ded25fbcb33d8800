"""Set-up: from a configuration to the parts of a run."""
