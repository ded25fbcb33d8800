"""What a run tells: progress, its record, a trace."""
