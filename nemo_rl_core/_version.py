"""The one place the version of nemo-rl-core and of every plugin shipped with it is written."""

__version__ = "0.1.0"
