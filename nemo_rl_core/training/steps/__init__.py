"""The run loop: take items, build a batch, update, refit, validate."""
