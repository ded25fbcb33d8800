"""Where the weights of a model come from: part by part out of safetensors files, so that no rank holds the whole.

What is not in such files under the names of the Hugging Face model is loaded whole by the Hugging Face library: random
weights, adapters, older names, quantized checkpoints, a head that is to be drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import is_scratch, load_model
from nemo_rl_core.models.adapter import base_of
from nemo_rl_plugins_megatron.mapping import Readable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from nemo_rl_core.schema import PolicyConfig

__all__ = ["WeightFiles", "WeightSource", "WholeModel", "open_weights"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""In files each expert has weights of its own; in the model they are one tensor, gate and up one after the other."""


class WeightSource(Protocol):
    """Gives Hugging Face weights by name, of which what is taken is read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each weight."""

    def read(self, name: str) -> Readable:
        """The weight."""

    def read_expert(self, name: str, expert: int) -> Readable:
        """The part of one expert, of a weight whose first dimension are the experts."""


class WholeModel:
    """The weights of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in self._weights.items()}

    def read(self, name: str) -> Tensor:
        """Return the weight [...]."""
        return self._weights[name].detach()

    def read_expert(self, name: str, expert: int) -> Tensor:
        """Return the part [...] of one expert, of a weight [num_experts, ...]."""
        return self.read(name)[expert]


class WeightFiles:
    """The weights of a checkpoint on disk; a file of a hub model is fetched when it is first read.

    Args:
        model_name: Folder or hub name.
        files: File of each tensor.
        shapes: Shape of each weight of the model.
        dtype: Of the tensors that are given.
    """

    def __init__(
        self, model_name: str, files: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self.model_name = model_name
        self.files = files
        self.shapes = shapes
        self.dtype = dtype
        self._last: tuple[Path, Any] | None = None

    def covers(self, name: str) -> bool:
        """Whether the files have this weight, as one or by expert."""
        if name in self.files or ".experts." not in name:
            return name in self.files
        return all(part in self.files for expert in range(self.shapes[name][0]) for part in _of(name, expert))

    def read(self, name: str) -> Readable:
        """The weight."""
        return _Stored(self, name, self.shapes[name])

    def read_expert(self, name: str, expert: int) -> Readable:
        """The part of one expert."""
        shape = self.shapes[name][1:]
        if name in self.files:
            return _Stored(self, name, self.shapes[name], expert)
        parts = _of(name, expert)
        return _Stacked([_Stored(self, part, (shape[0] // len(parts), *shape[1:])) for part in parts])

    def take(self, name: str, shape: tuple[int, ...], where: tuple[Any, ...]) -> Tensor:
        """Return a part [...] of a tensor that should be of this shape.

        Raises:
            ConfigError: It is not, or the file is damaged or missing.
        """
        from safetensors import SafetensorError

        path = _find(self.model_name, self.files[name]) or Path(self.model_name) / self.files[name]
        try:
            stored = self._open(path).get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise ConfigError(
                    f"In {path} the weight {name} has the shape {list(found)}, but by the config.json of "
                    f"{self.model_name!r} it is {list(shape)}. Files of two models are mixed up; get them anew."
                )
            part: Tensor = stored[where]
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"Cannot read the weight {name} of model {self.model_name!r} from {path}: {error}. The file is damaged "
                "or incomplete; get it anew."
            ) from error
        return part.to(self.dtype)

    def _open(self, path: Path) -> Any:
        """The file that was read last stays open: weights of a layer stand together."""
        from safetensors import safe_open

        if self._last is None or self._last[0] != path:
            self._last = None
            self._last = (path, safe_open(str(path), framework="pt"))
        return self._last[1]


@frozen
class _Stored:
    """A weight in a file, or that of one expert in it."""

    files: WeightFiles
    name: str
    whole: tuple[int, ...]
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of the expert's."""
        return self.whole if self.expert is None else self.whole[1:]

    def __getitem__(self, where: Any) -> Tensor:
        """Return rows [num_rows, ...] over all parts."""
        slices = where if isinstance(where, tuple) else (where,)
        return self.files.take(self.name, self.whole, slices if self.expert is None else (self.expert, *slices))


@frozen
class _Stacked:
    """Weights of one shape, the rows of the next after those of the last."""

    parts: Sequence[_Stored]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all."""
        rows, *rest = self.parts[0].shape
        return (rows * len(self.parts), *rest)

    def __getitem__(self, where: Any) -> Tensor:
        rows, *rest = where if isinstance(where, tuple) else (where,)
        size = self.parts[0].shape[0]
        first, end, _ = rows.indices(size * len(self.parts))
        taken = [(max(first - i * size, 0), min(end - i * size, size), part) for i, part in enumerate(self.parts)]
        return torch.cat([part[(slice(begin, stop), *rest)] for begin, stop, part in taken if begin < stop])


def _of(name: str, expert: int) -> list[str]:
    """Names in files for one expert of a weight of the model."""
    stem, last = name.rsplit(".", 1)
    return [f"{stem}.{expert}.{part}.weight" for part in _PARTS.get(last, (last,))]


def _find(model_name: str, file: str) -> Path | None:
    """A file of a folder or of the hub."""
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        model_name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _files(model_name: str) -> dict[str, str]:
    """File of each tensor; none if there are no readable safetensors files."""
    from safetensors import SafetensorError, safe_open

    try:
        if index := _find(model_name, _INDEX):
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if single := _find(model_name, _SINGLE):
            with safe_open(str(single), framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError):
        pass  # the Hugging Face library says what is wrong
    return {}


def open_weights(policy: PolicyConfig, hf_config: PreTrainedConfig, *, dtype: torch.dtype, seed: int) -> WeightSource:
    """The weights of `policy.model_name`, file by file where that can be.

    Raises:
        ConfigError: No such model, or a folder that is not a readable checkpoint.
    """
    name = str(policy.model_name)
    plain = not (is_scratch(name) or base_of(name) or getattr(hf_config, "quantization_config", None))
    if plain and (files := _files(name)):
        empty = load_model(name, dtype=dtype, head=policy.head, empty=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.named_parameters()}
        source = WeightFiles(name, files, shapes, dtype)
        if all(source.covers(one) for one in shapes):
            return source
    return WholeModel(load_model(name, dtype=dtype, seed=seed, head=policy.head))
