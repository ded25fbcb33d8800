"""Contract of a dataset source: where rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

__all__ = ["DatasetSource", "Rows"]


@runtime_checkable
class Rows(Protocol):
    """Rows addressable by index; any sequence of mappings qualifies."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class DatasetSource(Protocol):
    """Loads rows. A component of group `nemo_rl.datasets`: a class called with its config.

    A plain function `f(**options) -> rows` registered by `@register_dataset` works as well.

    A class may have a class method `accepts(source: str) -> bool`. It is called when a user gives a file,
    folder or hub name instead of a component, and must not use the network. The class that returns True
    gets that text as its option `path`. Rows with the attribute `ordered = True` are never shuffled.

    Attributes:
        config_class: attrs class of the source's options.
    """

    config_class: ClassVar[type]

    def load(self) -> Any:
        """Load the rows: `Rows`, or an iterable of mappings.

        An iterable is streamed in order. A resumed run calls its `load_state_dict` if it has `state_dict` and
        `load_state_dict`, and skips rows otherwise.

        Raises:
            DataError: A file is missing, unreadable or truncated; the message names file and line.
        """
        ...
