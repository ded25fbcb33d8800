"""The policy as agents see it: sessions, an HTTP endpoint, and the record of their calls."""
