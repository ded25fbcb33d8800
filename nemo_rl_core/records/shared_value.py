"""Large values that are sent to workers once, so that later messages only refer to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self
from uuid import uuid4

from nemo_rl_core.errors import InvariantViolation

if TYPE_CHECKING:
    import torch

__all__ = ["Movable", "SharedValue", "hold"]


class Movable(Protocol):
    """A value that can be moved to a device, such as a tensor."""

    def to(self, device: torch.device | str, /) -> Self:
        """Return the value on the device."""
        ...


_HELD: dict[str, Movable] = {}
"""Values that this process holds, by key."""


class SharedValue:
    """A value that the workers of a model hold; only its key is pickled.

    `Policy.keep` makes it. In the process that made it, it holds the value itself.

    Args:
        value: Something with `to(device)`, such as a tensor.
    """

    def __init__(self, value: Movable) -> None:
        self.key = uuid4().hex
        self._own: dict[str, Movable] | None = {self.key: value}

    def __getstate__(self) -> dict[str, Any]:
        """Return the key without the value."""
        return {"key": self.key, "_own": None}

    def on(self, device: torch.device | str) -> Any:
        """Return the value on a device; the first call moves it there.

        Raises:
            InvariantViolation: This process was never given the value.
        """
        held = _HELD if self._own is None else self._own
        if self.key not in held:
            raise InvariantViolation(
                f"This worker holds no value {self.key}. It was started after the value was given out; start the run "
                "again, it continues from its last checkpoint."
            )
        held[self.key] = held[self.key].to(device)
        return held[self.key]


def hold(worker: object, key: str, value: Movable) -> None:
    """Store, in a worker, the value for the `SharedValue` of this key."""
    _HELD[key] = value
