"""Explanations: how a name is resolved, and problems of the installation."""
