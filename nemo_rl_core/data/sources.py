"""Loading of rows from whatever a user names: a component, a file, a hub name, or rows in Python."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import attrs
from attrs import define, frozen

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import DataError, NemoRLError, PluginError
from nemo_rl_core.registry import PluginCall, comes_from_outside, contained, text_of
from nemo_rl_core.schema import DatasetConfig
from nemo_rl_core.schema.mistakes import suggest

__all__ = ["Finder", "LoadedRows", "RowStream", "TableRows", "load_rows"]

_KIND = "datasets"

T = TypeVar("T")


class Finder(Protocol):
    """Where dataset components are found: a registry, or what keeps a record of what a run uses of one.

    The latter has a method `chosen(ref)` too.
    """

    def names(self, kind: str) -> Sequence[str]:
        """Return the names of a kind."""
        ...

    def resolve(self, kind: str, name: str) -> object:
        """Return a reference to the component of that name."""
        ...


@frozen(kw_only=True)
class TableRows:
    """Rows addressable by index."""

    rows: Any
    """Has `__len__` and `__getitem__(int)`."""
    name: str
    """Name of the data in messages."""

    @property
    def ordered(self) -> bool:
        """Whether the source wants its rows in order (a curriculum): such rows are never shuffled."""
        return bool(getattr(self.rows, "ordered", False))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row. Raises DataError naming the row if the source cannot read it."""
        try:
            row: Mapping[str, Any] = self.rows[index]
        except NemoRLError:
            raise
        except Exception as e:
            raise DataError(f"Row {index} of {self.name} cannot be read: {type(e).__name__}: {e}") from e
        return row


@define(kw_only=True)
class RowStream:
    """Rows that can only be read in order."""

    open: Callable[[], Iterable[Mapping[str, Any]]]
    """Gives the rows from the start."""
    name: str
    restartable: bool = True
    """False for a generator object, which can be read once."""
    opened: bool = False

    def start(self, epoch: int) -> tuple[Iterator[Mapping[str, Any]], Any]:
        """Iterate from the first row; also returns the underlying iterable, which may have a state.

        Raises:
            DataError: It was read before and cannot be read again.
        """
        if self.opened and not self.restartable:
            raise DataError(
                f"{self.name} is a generator and was read to its end; epoch {epoch + 1} needs it again. Pass the "
                "function that makes it (without calling it), or set max_epochs to 1."
            )
        self.opened = True
        with contained(_KIND, self.open, "call"):  # a StopIteration here is not the end of the data
            rows = self.open()
            if hasattr(rows, "set_epoch"):
                rows.set_epoch(epoch)
            return self._guarded(iter(rows)), rows

    def _guarded(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except NemoRLError:
                raise
            except BaseException as e:
                if comes_from_outside(e):
                    raise
                text = f"{type(e).__name__}: {text_of(e)}"
                raise DataError(f"Row {number} of {self.name} cannot be read: {text}") from e
            yield row
            number += 1


LoadedRows = TableRows | RowStream


def load_rows(config: DatasetConfig, *, registry: Finder | None = None) -> LoadedRows:
    """Find and load the rows that a dataset's configuration names.

    `config.source` is, in this order: rows in Python (a sequence, an iterable, a function that returns
    either), a dataset component (class, object with `load`, or name), or a file, folder or hub name that an
    installed dataset component accepts. The last are asked by the class method `accepts(source) -> bool`,
    and the one that says yes gets the text as its option `path`.

    Args:
        config: The dataset's configuration; `limit` is applied.
        registry: Where components are found; None is the installed ones.

    Raises:
        DataError: Nothing is named, nothing accepts it, or it cannot be read or is empty.
        PluginError: A component is named that is missing or broken.
    """
    source = config.source
    if source is None:
        raise DataError("No dataset is given. Set `data.train.source` to a file, hub name or rows, or pass `dataset=`.")
    if isinstance(source, str):
        component, options = _find(source, config.options, registry)
        return _limited(_open(component, options, name=_called(source, config.options)), config.limit)
    return _limited(_open(_loaded(source), config.options, name=_described(source)), config.limit)


def _open(source: object, options: Any, *, name: str) -> LoadedRows:
    """Rows from a component, a function or Python rows."""
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):  # a data frame indexes by column
        source = source.to_dict("records")
    if isinstance(source, type) or hasattr(source, "load"):
        with PluginCall(_KIND, source, "__init__", "made"):
            component = source(finished_options(source, options)) if isinstance(source, type) else source
        with PluginCall(_KIND, component, "load"):
            return _wrapped(component.load(), component.load, name)
    if callable(source):
        keywords = options if isinstance(options, Mapping) else attrs.asdict(options)
        with PluginCall(_KIND, source, "call"):
            return _wrapped(source(**keywords), lambda: source(**keywords), name)
    return _wrapped(source, None, name)


def _wrapped(rows: Any, again: Callable[[], Any] | None, name: str) -> LoadedRows:
    if isinstance(rows, Mapping):
        raise DataError(
            f"{name} is a mapping with {', '.join(map(repr, list(rows)[:8]))}, not rows. If these are splits, pass one "
            f"of them, as in dataset[{next(iter(rows), 'train')!r}]."
        )
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise DataError(
            f"{name} gave a {type(rows).__name__}; expected rows: a list of dicts, an iterable of dicts, or an object "
            "with __len__ and __getitem__."
        )
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        if len(rows) == 0:
            raise DataError(f"{name} is empty: there is nothing to train or validate on.")
        return TableRows(rows=rows, name=name)
    if not isinstance(rows, Iterator):
        return RowStream(open=lambda: rows, name=name)
    first = [rows]  # the iterator that is already there is used before another is asked for
    return RowStream(
        open=lambda: first.pop() if first or again is None else again(), name=name, restartable=again is not None
    )


def _limited(rows: LoadedRows, limit: int | None) -> LoadedRows:
    if limit is None:
        return rows
    if isinstance(rows, TableRows):
        return rows if len(rows) <= limit else TableRows(rows=_FirstRows(rows.rows, limit), name=rows.name)
    whole = rows.open
    return RowStream(open=lambda: islice(whole(), limit), name=rows.name, restartable=rows.restartable)


@frozen
class _FirstRows:
    rows: Any
    limit: int

    @property
    def ordered(self) -> bool:
        return bool(getattr(self.rows, "ordered", False))

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> object:
        if not -self.limit <= index < self.limit:
            raise IndexError(index)
        return self.rows[index % self.limit]


# -- from text to a component -------------------------------------------------------------------------------


def _find(source: str, options: Any, registry: Finder | None) -> tuple[Any, Any]:
    """The component for a text, and its options."""
    registry = registry or _installed()
    path = os.path.expanduser(source)
    names: list[str] = list(registry.names(_KIND))
    unknown: PluginError | None = None
    if source in names or not (os.path.exists(path) or _looks_like_path(source)):
        try:
            return _loaded(_chosen(registry, registry.resolve(_KIND, source))), options
        except LookupError as e:  # PluginNotFound: perhaps a hub name
            named_after_one = source.partition("/")[0] in names  # such as `<component>/<task>`: not a hub name
            if source in names or named_after_one or not isinstance(e, PluginError):
                raise
            unknown = e
    for ref, component in _accepting(registry, names):
        if component.accepts(path if os.path.exists(path) else source):
            _chosen(registry, ref)
            given = options if isinstance(options, Mapping) else attrs.asdict(options)
            return component, {"path": path if os.path.exists(path) else source, **given}
    raise _not_found(source, names, exists=os.path.exists(path)) from unknown


def _chosen(registry: Finder, ref: T) -> T:
    """Tell a registry that keeps a record which component is used."""
    if hasattr(registry, "chosen"):
        registry.chosen(ref)
    return ref


def _accepting(registry: Finder, names: list[str]) -> Iterator[tuple[Any, Any]]:
    """Each installed dataset class that can say whether it accepts a text, with its reference.

    Broken plugins are passed over.
    """
    seen: set[int] = set()
    for name in names:
        try:
            ref = registry.resolve(_KIND, name)
            component = _loaded(ref)
        except PluginError:
            continue
        if id(component) not in seen and callable(getattr(component, "accepts", None)):
            seen.add(id(component))
            yield ref, component


def _not_found(source: str, names: list[str], *, exists: bool) -> DataError:
    installed = f"Installed dataset components: {', '.join(names) or 'none'}."
    if exists:
        return DataError(
            f"No installed dataset component reads {source!r}. {installed} Name the component (`source: <name>`, "
            "`options: {path: ...}`), convert the file, or install a package that reads it."
        )
    if _looks_like_path(source):
        return DataError(f"Dataset {source!r} does not exist (looked in {os.getcwd()}). Correct the path.")
    meant = suggest(source, names)
    return DataError(
        f"{source!r} is neither a dataset component nor an existing file, and no installed component takes it as a "
        f"name. {installed} "
        + (f"Did you mean {meant!r}?" if meant else "Correct the name, or install the package that provides it.")
    )


def _looks_like_path(source: str) -> bool:
    """A suffix of a file, a glob, or a leading dot, slash or tilde; a hub name (`owner/name`) has none."""
    return bool(re.match(r"^[~./\\]|^[A-Za-z]:\\", source) or re.search(r"[*?]|\.[A-Za-z]+(\.gz)?$", source))


def _installed() -> Finder:
    from nemo_rl_core.registry import get_registry

    return get_registry()


def _loaded(component: Any) -> Any:
    """The component behind a registry's reference; anything else is itself."""
    is_reference = all(hasattr(component, name) for name in ("kind", "name", "load"))
    return component.load() if is_reference else component


def _called(source: str, options: object) -> str:
    inside = options.get("path") if isinstance(options, Mapping) else getattr(options, "path", None)
    return f"{source} ({inside})" if inside else repr(source)


def _described(source: object) -> str:
    what = getattr(source, "__name__", None) or type(source).__name__
    return f"the dataset ({what})"
