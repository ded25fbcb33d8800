"""Parsers of YAML, JSON and TOML that keep the line of each value."""
