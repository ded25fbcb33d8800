"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import importlib
import os

__all__ = ["IMPORT_VARIABLE", "TRANSFER_BACKEND", "register"]

TRANSFER_BACKEND = "nemo_rl"
"""Name of our weight transfer engine in vLLM's registry."""
IMPORT_VARIABLE = "NEMO_RL_VLLM_IMPORT"
"""Names of modules to import, with commas between; set from `import_modules` while the engine starts."""


def register() -> None:
    """Make the weight transfer engine known, and import the modules that the configuration names.

    Called any number of times, in processes that use vLLM without NeMo RL too.

    Raises:
        ImportError: A named module cannot be imported; the engine then fails to start, with this in its log.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, "nemo_rl_plugins_vllm.receiver", "WeightReceiver")
    for name in filter(None, os.environ.get(IMPORT_VARIABLE, "").split(",")):
        importlib.import_module(name)
