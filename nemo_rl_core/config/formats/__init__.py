"""Files to plain values, with the line of each: YAML, JSON, TOML."""
