"""Estimates of a run on machines that are not here: memory, step time, simulated runs."""
