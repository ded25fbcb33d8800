"""The plugin core of NeMo RL: contracts, registry, configuration, run loop and rollouts."""

from nemo_rl_core._version import __version__

__all__ = ["__version__"]
