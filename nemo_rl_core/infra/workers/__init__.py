"""Worker processes: starting, calling and ending them, and their devices."""
