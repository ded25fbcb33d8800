"""Rollouts: from prompts to groups of finished episodes."""
