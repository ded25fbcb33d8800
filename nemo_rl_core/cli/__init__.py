"""The nemo-rl command."""
