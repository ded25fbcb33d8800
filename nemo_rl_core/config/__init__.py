"""Typed configuration: classes, loading, errors."""
