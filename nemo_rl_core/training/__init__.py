"""The run loop and what hangs on it."""
