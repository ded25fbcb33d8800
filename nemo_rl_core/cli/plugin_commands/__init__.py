"""The commands of `nemo-rl plugins`."""
