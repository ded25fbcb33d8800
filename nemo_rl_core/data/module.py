"""The data module: delivers the rows of a run in an order that survives a restart."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import evolve

from nemo_rl_core.data.order import FormattedRows, StreamOrder, TableOrder, TaskItem
from nemo_rl_core.data.prompts import RowFormat
from nemo_rl_core.data.sources import Finder, RowStream, load_rows
from nemo_rl_core.errors import DataError
from nemo_rl_core.schema import DataConfig, DatasetConfig

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

__all__ = ["DataModule", "TaskItem"]

_log = logging.getLogger(__name__)

_VERSION = 1


class DataModule:
    """Training and validation rows of one run.

    Rows are delivered epoch after epoch, each epoch in its own order from (seed, epoch) and independent of
    every global random state. Batches run on across the end of an epoch, so no row is skipped there; only
    what is left at the end of the last epoch and does not fill a batch is dropped. Nothing is loaded until
    it is needed. The position is kept by torchdata's `StatefulDataLoader`: a resumed run continues with
    the row after the last one delivered.

    Args:
        config: What to load and how a row becomes a prompt.
        seed: Of the order.
        max_epochs: Passes over the training data; None is without end.
        feed: "rollouts" formats rows as tasks, "examples" leaves the answer in (`RowFormat`).
        registry: Where dataset components are found; None is the installed ones.
        train_rows: Used in place of `config.train.source`; its columns and template still apply.
        validation_rows: Used in place of `config.validation.source`.
        stream_buffer: Rows held to shuffle those that come as a stream; 0 keeps a stream's order.

    Raises:
        DataError: On first use: a source is missing, unreadable or empty, or its rows lack a column.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        max_epochs: int | None = None,
        feed: Literal["rollouts", "examples"] = "rollouts",
        registry: Finder | None = None,
        train_rows: object = None,
        validation_rows: object = None,
        stream_buffer: int = 1000,
    ) -> None:
        validation = config.validation
        if validation_rows is not None:
            # Validation rows given in Python look like the training rows unless something else is said.
            validation = evolve(validation or evolve(config.train, limit=None), source=validation_rows, options={})
        train = config.train if train_rows is None else evolve(config.train, source=train_rows, options={})
        self._configs: dict[str, DatasetConfig | None] = {"train": train, "validation": validation}
        self._shuffle = config.shuffle
        self._seed = seed
        self._max_epochs = max_epochs
        self._feed = feed
        self._registry = registry
        self._stream_buffer = stream_buffer if config.shuffle else 0
        self._sets: dict[str, FormattedRows] = {}
        self._loader: Any = None
        self._iterator: Iterator[TaskItem] | None = None
        self._before_end: dict[str, Any] | None = None
        self._delivered = 0

    # -- training ---------------------------------------------------------------------------------

    def next(self, num: int) -> list[TaskItem] | None:
        """The next `num` rows of the run; None if fewer are left before the end of the last epoch (they are dropped).

        Raises:
            DataError: All epochs together are smaller than one batch, or a row cannot be used.
        """
        total = self.total_items
        if total is not None and total < num:
            raise DataError(
                f"One step takes {num} rows, but {self._train.name} has {total // (self._max_epochs or 1)} "
                f"in {self._max_epochs} epoch(s). Take fewer prompts per step, or raise max_epochs."
            )
        if total is not None and total - self._delivered < num:
            if total > self._delivered:
                _log.info("%d rows at the end of the data do not fill a batch of %d", total - self._delivered, num)
            return None
        iterator = self._started()
        if total is None:
            self._before_end = self._loader.state_dict()
        items = list(islice(iterator, num))
        if len(items) < num:
            if self._delivered == 0:
                raise DataError(f"One step takes {num} rows, but {self._train.name} has {len(items)} in all.")
            if total is not None:  # a row raised StopIteration, which must not pass for the end
                raise DataError(
                    f"{self._train.name} ended after {self._delivered + len(items)} of its {total} rows. Its __len__ "
                    "says more than it gives, or its __getitem__ raises StopIteration."
                )
            return None
        self._before_end = None
        self._delivered += num
        return items

    def __len__(self) -> int:
        """Rows of the training data in one epoch. Raises TypeError for a stream, whose length is unknown."""
        if self._train.size is None:
            raise TypeError(f"{self._train.name} is a stream: its length is not known before it was read.")
        return self._train.size

    @property
    def total_items(self) -> int | None:
        """Rows over all epochs; None if that is unknown or without end."""
        size = self._train.size
        return None if size is None or self._max_epochs is None else size * self._max_epochs

    def total_steps(self, num: int) -> int | None:
        """Batches of `num` before `next` returns None; None if unknown or without end."""
        return None if self.total_items is None else self.total_items // num

    # -- validation -------------------------------------------------------------------------------

    @property
    def has_validation(self) -> bool:
        """Whether validation data is configured."""
        return self._configs["validation"] is not None

    def validation(self, limit: int | None = None) -> list[TaskItem]:
        """The first `limit` validation rows in their own order; none if there is no validation data."""
        if not self.has_validation:
            return []
        rows = self._set("validation")
        if isinstance(rows.rows, RowStream):
            stream, _ = rows.rows.start(0)
            numbered = enumerate(islice(stream, limit))
        else:
            count = len(rows.rows) if limit is None else min(limit, len(rows.rows))
            numbered = enumerate(rows.rows[i] for i in range(count))
        items = [rows.item(index=i, epoch=0, row_index=i, row=row) for i, row in numbered]
        if not items:
            raise DataError(f"{rows.name} is empty: there is nothing to validate on.")
        return items

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position of the run in its data, as plain values that JSON can hold."""
        self._started()
        return {
            "version": _VERSION,
            "delivered": self._delivered,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self._train.fingerprint(),
            "loader": self._before_end or self._loader.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed_data: bool = False) -> None:
        """Continue after the last row delivered when `state` was taken.

        Args:
            state: From `state_dict`.
            allow_changed_data: Only warn if the data are not those of the saved run.

        Raises:
            DataError: The data or the order are not those of the saved run, so continuing would repeat or
                skip rows.
        """
        changes = self._changes(state)
        if changes:
            message = (
                f"{self._train.name} is not what the saved run was reading: {'; '.join(changes)}. Continuing at row "
                f"{state['delivered']} of its order would repeat or skip rows. Restore the data and settings, or "
                "start a new run (another `run_dir`, or `checkpointing.resume: never`)."
            )
            if not allow_changed_data:
                raise DataError(message)
            _log.warning(message)
        self._iterator = None
        self._before_end = None
        self._loader = self._new_loader()
        self._loader.load_state_dict(dict(state["loader"]))
        self._delivered = int(state["delivered"])

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        now = {"seed": self._seed, "shuffle": self._shuffle, **self._train.fingerprint()}
        saved = {"seed": state.get("seed"), "shuffle": state.get("shuffle"), **state.get("fingerprint", {})}
        changed = [(key, saved.get(key), value) for key, value in now.items() if saved.get(key) != value]
        return [f"{key} was {was!r} and is {value!r}" for key, was, value in changed]

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _train(self) -> FormattedRows:
        return self._set("train")

    def _set(self, which: str) -> FormattedRows:
        if which not in self._sets:
            config = self._configs[which]
            assert config is not None
            rows = load_rows(config, registry=self._registry)
            self._sets[which] = FormattedRows(rows, RowFormat.from_config(config, source=rows.name), self._feed)
        return self._sets[which]

    def _started(self) -> Iterator[TaskItem]:
        if self._loader is None:
            self._loader = self._new_loader()
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return self._iterator

    def _new_loader(self) -> StatefulDataLoader[TaskItem]:
        rows = self._train
        if isinstance(rows.rows, RowStream):
            return _stateful_loader(StreamOrder(rows, self._seed, self._stream_buffer, self._max_epochs))
        order = TableOrder(len(rows.rows), self._seed, shuffle=self._shuffle and not rows.rows.ordered)
        return _stateful_loader(rows, sampler=order)


def _stateful_loader(rows: object, **options: object) -> StatefulDataLoader[TaskItem]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    # The loader draws a seed that nothing here uses; without its own generator it would draw from the global one.
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls a deprecated function
        return StatefulDataLoader(rows, batch_size=None, collate_fn=_unchanged, generator=generator, **options)


def _unchanged(item: TaskItem) -> TaskItem:
    return item
