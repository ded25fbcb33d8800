"""The clipped value loss of PPO's critic.

Legend: B sequences, N tokens of one micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token
from nemo_rl_plugins_ppo.alignment import values_before
from nemo_rl_plugins_ppo.config import ClippedValueConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ClippedValueLoss"]


class ClippedValueLoss:
    """scale / 2 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) for each sampled token.

    V is the value of the state before the token, R the return that follows. Source: the reference implementation of
    PPO (arXiv:1707.06347; the clip is not in the paper).

    Args:
        config: See `ClippedValueConfig`.
    """

    config_class: ClassVar[type] = ClippedValueConfig
    needs: frozenset[str] = frozenset({"values"})

    def __init__(self, config: ClippedValueConfig | None = None) -> None:
        self.config = config or ClippedValueConfig()
        self.denominator: Denominator = "tokens" if self.config.aggregation == "token" else "sequences"

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over the trained tokens of one micro-batch.

        Args:
            outputs: With `values` [N], the head's output at each token.
            batch: With `returns` [N] and, for the clip, `values` [N] (of the states before the tokens, as they were
                before this step), both read where `loss_mask` [N] is True.

        Raises:
            ShapeMismatch: `outputs.values` is not [N].
            ConfigError: The batch has no `returns`, or no `values` to clip to.
        """
        current = per_token(outputs.values, batch, "outputs.values")
        clip, mask = self.config.clip_range, batch["loss_mask"]
        _require(batch, {"returns"} | ({"values"} if clip is not None else set()))
        values = values_before(current, batch).masked_fill(~mask, 0.0)
        returns = batch["returns"].masked_fill(~mask, 0.0)
        errors = (values - returns).square()
        metrics = {"values_mean": _mean(values, mask), "returns_mean": _mean(returns, mask)}
        metrics["squared_error"] = _mean(errors, mask)
        if clip is not None:
            before = batch["values"].masked_fill(~mask, 0.0)
            held = (before + (values - before).clamp(-clip, clip) - returns).square()
            metrics["clip_fraction"] = _mean((held > errors).to(errors.dtype), mask)
            errors = torch.maximum(errors, held)
        if self.config.aggregation == "sequence":
            errors = errors / batch.expand_to_tokens(batch.sum_per_sequence(mask.to(errors.dtype)).clamp(min=1))
        return LossSums(0.5 * self.config.scale * errors.sum(), metrics)


def _require(batch: BatchedDataDict, fields: set[str]) -> None:
    if missing := sorted(fields - batch.field_names):
        raise ConfigError(
            f"The loss `ppo_value` needs {', '.join(missing)} in the batch, which has {sorted(batch.field_names)}. Use "
            "it with an algorithm that fills them, such as ppo."
        )


def _mean(values: Tensor, mask: Tensor) -> Metric:
    """The mean over trained tokens; `values` are 0 where masked."""
    return Metric(values.detach().masked_fill(~mask, 0.0).sum(), mask.sum())
