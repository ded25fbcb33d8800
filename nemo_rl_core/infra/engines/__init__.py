"""Generation engines in separate processes."""
