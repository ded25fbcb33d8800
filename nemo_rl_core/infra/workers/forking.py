"""How worker processes start: forked from a process that has imported what most of them need, or spawned anew.

Importing torch and the models of transformers takes a new process seconds of a core. So the first worker of this
process starts a fork server (see `multiprocessing`), which imports them once and has a single thread; each worker is a
fork of it, with memory that all of them share. A worker is spawned instead where a fork would not be the same: on a
device other than the CPU, whose driver must not be forked, and where environment variables that those libraries may
have read have changed since.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Set
from multiprocessing.context import BaseContext

__all__ = ["START_VARIABLE", "start_context"]

START_VARIABLE = "NEMO_RL_WORKER_START"
"""Set it to "spawn", and no worker is forked."""

_IMPORTED = ["torch.distributed.fsdp", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]
_READ = re.compile(
    "TORCH|PYTORCH|PT2|AOT|INDUCTOR|CUDA|NVIDIA|NCCL|GLOO|TP_|USE_|UNSAFE_|XLA"  # torch and what it is built on
    "|OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|BLIS|NUMPY|NPY|SYMPY|MPMATH|LD_|MALLOC|GLIBC"
    "|HF_|HUGGINGFACE|TRANSFORMERS|SAFETENSORS|TOKENIZERS|ACCELERATE|BITSANDBYTES|PEFT"
    "|PYTHON|PATH$|HOME$|TMP|TEMP|XDG_|LANG|LC_|.*_PROXY$|.*_CA_BUNDLE$|SSL_",
    re.IGNORECASE,
)
"""Names of variables that the imported libraries, the interpreter or the C library may have read."""
_THREADS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
"""Variables that a worker whose number of threads is given sets in torch itself."""

_at_its_start: dict[str, str] | None = None
"""Environment of the fork server, once it has been asked for."""


def start_context(device: str, variables: Mapping[str, str], *, threads_given: bool) -> BaseContext:
    """Return the context of `multiprocessing` that a worker is to be started with.

    Args:
        device: Of the worker, as torch names it.
        variables: Environment variables that it gets beside those of this process.
        threads_given: Whether it sets its number of threads itself.
    """
    global _at_its_start
    wanted = os.environ.get(START_VARIABLE)
    if device != "cpu" or sys.platform != "linux" or wanted == "spawn":
        return multiprocessing.get_context("spawn")
    if _at_its_start is None:
        _at_its_start = dict(os.environ)
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))
    passed_over = _THREADS if threads_given else frozenset[str]()
    if _read(_at_its_start, passed_over) != _read({**os.environ, **variables}, passed_over):
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


def _read(environment: Mapping[str, str], passed_over: Set[str]) -> dict[str, str]:
    """What the libraries may have read of an environment when they were imported."""
    return {n: value for n, value in environment.items() if n not in passed_over and _READ.match(n)}
