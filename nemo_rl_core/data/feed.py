"""Feed of the run loop with rows of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl_core.data.module import DataModule

__all__ = ["ExampleFeed"]


class ExampleFeed:
    """Rows, in the data module's order."""

    def __init__(self, data: DataModule, num_items: int) -> None:
        self.data = data
        self.num_items = num_items

    def next(self, version: int) -> list[Any] | None:
        """The next step's rows; None at the end of the data."""
        items = self.data.next(self.num_items)
        return None if items is None else [item.task for item in items]

    def state_dict(self) -> dict[str, Any]:
        """Return the position at which the next step begins."""
        return {"data": self.data.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, version: int = 0) -> None:
        """Continue from `state_dict`."""
        self.data.load_state_dict(state["data"])
