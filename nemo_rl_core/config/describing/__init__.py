"""Configurations as text: written out, compared, and their fields described."""
