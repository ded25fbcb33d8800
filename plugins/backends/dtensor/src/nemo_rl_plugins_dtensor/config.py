"""Options of the backend (`policy.options`)."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, gt, one_of, optional

__all__ = ["DTensorConfig", "LoRAConfig"]


@frozen(kw_only=True)
class LoRAConfig:
    """`policy.options.lora`: train low-rank adapters, the model's own weights stay as they are (arXiv:2106.09685)."""

    path: str | None = None
    """Folder of an adapter in PEFT's format to start from; its rank, alpha and modules are taken from there."""
    rank: int | None = field(default=None, validator=optional(ge(1)))
    """Rank of each adapter; None is 16."""
    alpha: float | None = field(default=None, validator=optional(gt(0)))
    """The adapter's output is multiplied by alpha / rank; None is twice the rank."""
    dropout: float = field(default=0.0, validator=ge(0))
    """Share of an adapter's inputs that is dropped while training. Keep 0 where rollouts are trained on: the
    probability of a token must be one number."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; none named is all of the decoder."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732), for ranks of 64 and more."""
    export: Literal["adapter", "merged", "both"] = field(
        default="adapter", validator=one_of("adapter", "merged", "both")
    )
    """What `model/` of a finished run is: the adapter in PEFT's format; the whole model with the adapter added to its
    weights; or the whole model with the adapter in the folder `adapter` below."""


@frozen(kw_only=True)
class DTensorConfig:
    """`policy.options` of the dtensor backend."""

    attention: Literal["auto", "packed", "padded"] = "auto"
    """packed: sequences stand one after another in one row, and no layer sees padding; padded: [B, T] with a mask,
    for models whose attention cannot be replaced; auto: packed wherever it gives what the model itself gives."""
    share_prefixes: bool = True
    """Compute the beginning that sequences of a micro-batch have in common (the prompt of a group) once, where that
    saves at least a tenth of the work; only with packed attention. Probabilities and gradients change by rounding."""
    master_weights: bool = True
    """With precision bfloat16: keep float32 weights, gradients and optimizer state beside the bfloat16 weights that
    compute. False trains in bfloat16 alone: a third of the memory, but updates below 1/256 of a weight are lost."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters instead of the weights; `{}` takes the defaults. Needs `nemo-rl-dtensor[lora]`."""
