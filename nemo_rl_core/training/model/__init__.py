"""One model in its workers: batches cut and packed, steps, metrics, turns on the devices, invariants."""
