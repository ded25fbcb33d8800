"""One model in its workers: sharding, packing, steps, metrics, turns on the devices, invariants."""
