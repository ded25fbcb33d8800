"""One dataset class per generator, made when it is asked for: `named.chain_sum` is the source of `chain_sum`."""

from __future__ import annotations

from typing import Any

from nemo_rl_plugins_env_reasoning_gym.dataset import ReasoningGymSource
from nemo_rl_plugins_env_reasoning_gym.tasks import known_tasks

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name not in known_tasks():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(
        name, (ReasoningGymSource,), {"task_name": name, "__module__": __name__, "__doc__": f"Rows of `{name}`."}
    )
    globals()[name] = made  # the same class every time, so that it can be pickled by reference
    return made
