"""Putting new weights into the engine's model: aliased where possible, else copied in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.infra.weights.fingerprint import CachedSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["load_weights", "named_weights"]

_SHOWN = 5


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's parameters [...] by Hugging Face name; a tied one comes once."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def load_weights(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], *, share: bool, sums: CachedSums | None = None
) -> int:
    """Replace every parameter of `model` by tensors [...] of the same shapes.

    Args:
        model: A Hugging Face module.
        tensors: Name and full tensor; a tied weight comes once, under any of its names.
        share: Let the parameters alias the tensors where device and type are equal.
        sums: Takes in, by the names of `named_weights`, what was copied.

    Returns:
        Bytes copied; 0 when everything is aliased.

    Raises:
        GenerationError: A name is unknown, a shape differs, or a parameter is missing. With `share`
            the model is then unchanged; otherwise the tensors before the bad one are loaded.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(parameters.items())}
    missing = dict(first)
    buffers = dict(model.named_buffers())
    if share:
        tensors = list(tensors)
        _check_all(parameters, buffers, missing, tensors)
    copied = 0
    with torch.no_grad():
        for name, tensor in tensors:
            target = _target(parameters, buffers, name, tensor)
            missing.pop(id(target), None)
            if share and name in parameters and tensor.dtype == target.dtype and tensor.device == target.device:
                target.data = tensor.detach()
            else:
                target.copy_(tensor)
                if sums is not None and id(target) in first:
                    sums.add(first[id(target)], target)
                copied += tensor.numel() * target.element_size()
    _refuse_missing(missing)
    return copied


def _check_all(
    parameters: dict[str, Any], buffers: dict[str, Any], missing: dict[int, str], tensors: list[tuple[str, Tensor]]
) -> None:
    """Raise unless the tensors [...] have the names and shapes of all parameters."""
    left = dict(missing)
    for name, tensor in tensors:
        left.pop(id(_target(parameters, buffers, name, tensor)), None)
    _refuse_missing(left)


def _target(parameters: dict[str, Any], buffers: dict[str, Any], name: str, tensor: Tensor) -> Any:
    """Return the parameter or buffer [...] of a name, which must have the shape of the tensor."""
    target = parameters.get(name, buffers.get(name))
    if target is None:
        raise GenerationError(
            f"Weight update: the model has no weight {name!r}. Its names look like {sorted(parameters)[:_SHOWN]}. "
            "The trainer must export Hugging Face names of the same model."
        )
    if target.shape != tensor.shape:
        raise GenerationError(
            f"Weight update: {name!r} has shape {tuple(tensor.shape)}, the model needs {tuple(target.shape)}. "
            "The trainer must export full tensors of the same model."
        )
    return target


def _refuse_missing(missing: dict[int, str]) -> None:
    if missing:
        names = sorted(missing.values())
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise GenerationError(
            f"Weight update: {len(names)} weights did not come: {names[:_SHOWN]}{more}. "
            "The trainer must export every weight."
        )
