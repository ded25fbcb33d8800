"""What a run would take, on machines that are not here: memory, step time, and simulated runs."""
