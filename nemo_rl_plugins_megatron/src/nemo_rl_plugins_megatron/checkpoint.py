"""Checkpoints in megatron-core's distributed format, which any layout of workers writes and any other one reads.

A checkpoint is a folder `trainer/` that `megatron.core.dist_checkpointing` has written, each weight and each tensor of
the optimizer under a name and at a place that are the model's and not a worker's; and beside it `trainer.pt`, sealed,
with what the run must agree in, the random states of the workers, and size and checksum of every file of the folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from nemo_rl_core.backends import sealed_file
from nemo_rl_core.errors import CheckpointError
from nemo_rl_plugins_megatron._megatron import (
    CheckpointingException,
    ShardedObject,
    dist_checkpointing,
    parallel_state,
    torch_strategy,
)

if TYPE_CHECKING:
    from nemo_rl_plugins_megatron.model import PolicyModel
    from nemo_rl_plugins_megatron.optimizer import Optimizer, Share

__all__ = ["load", "save"]

_FOLDER, _INDEX = "trainer", "trainer.pt"
_LAYOUT: dict[str, Any] = {"singleton_local_shards": True}
"""Each layer and expert under its number: megatron-core's other form names devices, and those of a GPU."""


class _SaveInProcess(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron-core's writer without the processes that it forks, for which it would wait without an end."""

    def save(self, sharded_state_dict: object, checkpoint_dir: str | Path) -> None:
        """Write, and return on every rank when all have written, or raise on every rank."""
        by_key, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            torch_strategy.mcore_to_pyt_state_dict(by_key),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=torch_strategy.MCoreSavePlanner(flatten_state_dict=False, can_run_decentralized_global_plan=False),
        )


def save(path: Path, model: PolicyModel, optimizer: Optimizer, identity: Mapping[str, Any], rng: object) -> None:
    """Write a checkpoint into the existing folder `path`, which all ranks see; a collective.

    Args:
        path: Of the checkpoint.
        model: This rank's part.
        optimizer: Of these weights.
        identity: What a run that continues must agree in.
        rng: This rank's random state.

    Raises:
        CheckpointError: It cannot be written; on every rank.
    """
    folder = path / _FOLDER

    def make_room() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    _on_all(make_room, f"make the folder {folder}")
    weights = _sharded(model)
    state = {"weights": weights, "optimizer": dict(_written(weights, optimizer))}
    _on_all(
        lambda: dist_checkpointing.save(state, str(folder), sharded_strategy=_SaveInProcess("torch_dist", 1)),
        f"write the checkpoint {folder}",
    )
    files = sorted(file for file in folder.iterdir() if file.is_file())
    mine = {file.name: sealed_file.measure(file) for file in _my_share(files)}
    measured = {name: found for part in _gathered(mine) for name, found in part.items()}
    index = {**identity, "num_steps": optimizer.num_steps, "rng": _gathered(rng), "files": measured}

    def seal() -> None:
        if dist.get_rank() == 0:
            sealed_file.write(path / _INDEX, index)

    _on_all(seal, f"write {path / _INDEX}")


def load(path: Path, model: PolicyModel, optimizer: Optimizer, identity: Mapping[str, Any]) -> Any:
    """Put a checkpoint in place, whichever layout wrote it; a collective.

    Returns:
        The random state of this rank, or of another one if there were fewer.

    Raises:
        CheckpointError: Names the file that is missing, damaged or of another model.
    """
    found: list[Any] = []
    sealed_file.restore(path / _INDEX, lambda index: found.append(_fitting(index, identity)))
    index = found[0]
    folder = path / _FOLDER

    def check() -> None:
        for name in _my_share(sorted(index["files"])):
            sealed_file.check_unchanged(folder / name, *index["files"][name])

    _on_all(check, f"read the checkpoint {folder}")
    weights = _sharded(model)
    wanted = {"weights": {name: _empty(one) for name, one in weights.items()}, "optimizer": {}}
    shares = [share for share in optimizer.shares() if share.part.stop > share.part.start]
    by_weight = {id(one.data): one for one in weights.values()}
    for number, share in enumerate(shares):
        for name in share.tensors:
            wanted["optimizer"][f"{number}.{name}"] = _empty(by_weight[id(share.weight)], name)
    read = _read(wanted, folder)
    with torch.no_grad():
        for name, one in weights.items():
            one.data.copy_(read["weights"][name])
        for number, share in enumerate(shares):
            for name, tensor in share.tensors.items():
                tensor.copy_(read["optimizer"][f"{number}.{name}"].view(-1)[share.part].view_as(tensor))
    optimizer.restored(int(index["num_steps"]))
    return index["rng"][dist.get_rank() % len(index["rng"])]


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is wanted, each at the place that it names; no more is read than this rank's part."""
    found: list[dict[str, Any]] = []

    def read() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated")  # megatron-core's own
            found.append(dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False))

    _on_all(read, f"read the checkpoint {folder}")
    return found[0]


def _fitting(index: dict[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The index, if it is of this run; a ValueError says what differs."""
    for name, value in identity.items():
        if name == "parameters":
            _check_parameters(index[name], value)
        elif index[name] != value:
            raise ValueError(f"its {name} is {index[name]!r}, here it is {value!r}")
    return index


def _check_parameters(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if saved.keys() != here.keys():
        raise ValueError(f"other parameters: {sorted(saved.keys() ^ here.keys())[:4]}")
    if wrong := [name for name, shape in here.items() if tuple(saved[name]) != tuple(shape)]:
        raise ValueError(f"other shapes: {wrong[:4]}")


# -- what is written and read -----------------------------------------------------------------


def _sharded(model: PolicyModel) -> dict[str, Any]:
    """This rank's weights, each with its name and place in the whole model."""
    found = model.sharded_state_dict(metadata=dict(_LAYOUT))
    weights = {name: one for name, one in found.items() if not isinstance(one, ShardedObject)}
    for number, one in enumerate(weights.values()):
        # Data-parallel ranks take turns to write, too.
        is_expert = not getattr(one.data, "allreduce", True)
        size = _num_replicas(is_expert)
        one.replica_id = (*one.replica_id[:2], (one.replica_id[2] - number) % size)
    return weights


def _num_replicas(is_expert: bool) -> int:
    """Data-parallel ranks with the same part of a weight."""
    if is_expert:
        return int(parallel_state.get_expert_data_parallel_world_size())
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def _written(weights: Mapping[str, Any], optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """What this rank writes of the optimizer; data-parallel ranks take turns, so that all write and none holds all."""
    by_weight = {id(one.data): one for one in weights.values()}
    for number, share in enumerate(optimizer.shares()):
        place = by_weight[id(share.weight)]
        if share.group is not None and any(place.replica_id[:2]):
            continue  # another group of ranks writes the same
        for name in share.tensors:
            if (whole := _whole(share, name, number)) is not None:
                replica = place.replica_id if share.group is None else (*place.replica_id[:2], 0)
                yield f"{number}.{name}", _like(place, name, whole, replica)


def _whole(share: Share, name: str, number: int) -> Tensor | None:
    """Return a tensor of the optimizer in its weight's shape [...], on the one rank of the group that writes it."""
    tensor = share.tensors[name]
    if share.group is None:
        return tensor.view_as(share.weight)
    flat = tensor.new_zeros(share.weight.numel())
    flat[share.part] = tensor.view(-1)
    ranks = dist.get_process_group_ranks(share.group)
    writer = ranks[number % len(ranks)]
    # Bytes: a sum of floats makes zeros of negative zeros.
    dist.reduce(flat.view(torch.uint8), dst=writer, group=share.group)
    return flat.view_as(share.weight).cpu() if dist.get_rank() == writer else None


def _like(place: Any, name: str, data: Tensor, replica: object) -> Any:
    """Return a tensor [...] of the optimizer at the place of its weight."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{place.key}",
        "data": data.detach(),
        "replica_id": replica,
    }
    if hasattr(place, "dtype"):
        changes["dtype"] = data.dtype
    return dataclasses.replace(place, **changes)


def _empty(place: Any, name: str | None = None) -> Any:
    """The place of a weight, or of one of its optimizer's tensors, to be read into."""
    if name is None:
        return dataclasses.replace(place, data=torch.empty_like(place.data, device="cpu", requires_grad=False))
    data = torch.empty_like(place.data, device="cpu", dtype=torch.float32, requires_grad=False)
    return _like(place, name, data, place.replica_id)


# -- ranks ------------------------------------------------------------------------------------


def _gathered(value: object) -> list[Any]:
    """Of all ranks, in order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _my_share(items: list[Any]) -> list[Any]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _on_all(work: Callable[[], Any], what: str) -> None:
    """Do this rank's part; if one fails, all raise what it says."""
    failure = None
    try:
        work()
    except CheckpointError as error:
        failure = str(error)
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointingException, dcp.CheckpointException) as error:
        failure = f"Cannot {what}: {type(error).__name__}: {error}"
    if failures := [one for one in _gathered(failure) if one]:
        raise CheckpointError(failures[0])
