"""A configuration as text: written out, compared, and its fields described."""
