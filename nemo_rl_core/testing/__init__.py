"""Fakes and contracts for plugin tests."""
