"""Parts that training backends are made of; imported by backends and their kits, by nothing of the run."""
