"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import importlib
import os
from functools import partial

from nemo_rl_core.machine.threads import watch_parent

__all__ = ["HOST_VARIABLE", "IMPORT_VARIABLE", "TRANSFER_BACKEND", "register"]

TRANSFER_BACKEND = "nemo_rl"
"""Name of our weight transfer engine in vLLM's registry."""
IMPORT_VARIABLE = "NEMO_RL_VLLM_IMPORT"
"""Names of modules to import, with commas between; set from `import_modules` while the engine starts."""
HOST_VARIABLE = "NEMO_RL_VLLM_HOST"
"""Id of the process in which our backend lives; set while the engine starts."""
_LOOK_EVERY_S = 1.0
_watching_in = 0
"""Id of the process that watches its parent already: a forked one begins with the memory of another."""


def register() -> None:
    """Make the weight transfer engine known, and import the modules that the configuration names.

    A process of an engine that our backend has started also ends when its parent has: vLLM's own would stay behind a
    parent that was killed, and keep the device's memory from the engine that is started in its place.

    Called any number of times, in processes that use vLLM without NeMo RL too.

    Raises:
        ImportError: A named module cannot be imported; the engine then fails to start, with this in its log.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, "nemo_rl_plugins_vllm.receiver", "WeightReceiver")
    for name in filter(None, os.environ.get(IMPORT_VARIABLE, "").split(",")):
        importlib.import_module(name)
    host = os.environ.get(HOST_VARIABLE)
    if host is not None and int(host) != os.getpid():
        _end_with_parent()


def _end_with_parent() -> None:
    global _watching_in
    if _watching_in == os.getpid():
        return
    _watching_in = os.getpid()
    watch_parent(partial(os._exit, 1), name="nemo-rl-parent-watch")
