"""Launchers, resources, weight sync, checkpoints, timers."""
