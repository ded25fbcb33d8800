"""Reports of a run: progress, its record, a trace."""
