"""The typed contract of each kind of component, one file per kind."""
