"""The policy as agents see it: sessions, an HTTP endpoint, and what was recorded of their calls."""
