"""Contract of a dataset source."""

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

    A plain function `f(**options) -> rows` registered by `@register_dataset` serves as well.

    A class may have a class method `accepts(source: str) -> bool`. It is asked, without touching the
    network, when a user names a file, folder or hub name instead of a component; the class that says yes
    gets that text as its option `path`. Rows may carry `ordered = True`: they are then never shuffled.

    Attributes:
        config_class: attrs class of the source's options.
    """

    config_class: ClassVar[type]

    def load(self) -> Any:
        """The rows: `Rows`, or an iterable of mappings.

        An iterable is streamed in order; it is resumed by skipping, or by `state_dict`/`load_state_dict` if it
        has them.

        Raises:
            DataError: A file is missing, unreadable or truncated; names file and line.
        """
        ...
