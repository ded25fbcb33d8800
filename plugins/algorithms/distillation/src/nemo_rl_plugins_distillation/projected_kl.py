"""KL between the teacher and the student's distribution projected onto the teacher's vocabulary.

Legend: N tokens, M trained ones that belong to a chunk, C chunks, K teacher's ids, R student's ids of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric
from nemo_rl_plugins_distillation.base import nll_sum
from nemo_rl_plugins_distillation.chunks import NEVER, Chunks
from nemo_rl_plugins_distillation.conformance import add_projected_teacher
from nemo_rl_plugins_distillation.forward_kl import forward_kl
from nemo_rl_plugins_distillation.loss_config import ProjectedKLConfig
from nemo_rl_plugins_distillation.reverse_kl import reverse_kl
from nemo_rl_plugins_distillation.support import on_support

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ProjectedKLLoss"]


class ProjectedKLLoss:
    """Divergence of the mean distributions of each chunk, on the teacher's likeliest tokens there.

    It reads `top_ids`, `projection_weights` [N, K, R], `teacher_top_logprobs` [N, K] (of the chunk, the same at each of
    its tokens) and `chunk_ids` [N]. A chunk counts as many times as it has tokens of the student, so that the divisor
    is the number of trained tokens; tokens without a chunk count 0.
    """

    config_class: ClassVar[type] = ProjectedKLConfig
    denominator: Denominator = "tokens"
    required_fields: frozenset[str] = frozenset({"projected_teacher"})
    conformance: ClassVar[Mapping[str, Any]] = {"add_fields": add_projected_teacher}

    def __init__(self, config: Any = None) -> None:
        self.config: ProjectedKLConfig = config if config is not None else ProjectedKLConfig()
        self.needs = frozenset({"top_logprobs", "logprobs"} if self.config.nll_weight else {"top_logprobs"})

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the chunks of one micro-batch.

        Raises:
            ShapeMismatch: The student's logprobs are not of the projected tokens.
        """
        weights: Tensor = batch["projection_weights"]
        if outputs.top_logprobs is None or outputs.top_logprobs.shape != weights.shape:
            shape = None if outputs.top_logprobs is None else list(outputs.top_logprobs.shape)
            raise ShapeMismatch(f"outputs.top_logprobs has shape {shape}, projection_weights {list(weights.shape)}.")
        chunks, mask, config = Chunks.of(batch), batch["loss_mask"], self.config
        at = chunks.selected
        student = (outputs.top_logprobs[at].exp() * weights[at].to(outputs.top_logprobs.dtype)).sum(-1)
        teacher = chunks.mean(batch["teacher_top_logprobs"][at].to(student.dtype))
        known = teacher > NEVER / 2  # else nothing of the student is projected there
        mean = chunks.mean(student).clamp(min=torch.finfo(student.dtype).tiny).log()
        pair = on_support(mean.masked_fill(~known, NEVER)[:, None], teacher[:, None], tail=config.tail)
        forward, reverse = forward_kl(pair), reverse_kl(pair, None, outside_logprob=0.0)
        each = config.forward_weight * forward + (1 - config.forward_weight) * reverse
        total = (each[:, 0] * chunks.sizes).sum()
        metrics = {
            "divergence": Metric(total.detach(), mask.sum()),
            "aligned_fraction": Metric(at.sum(), mask.sum()),
            "teacher_top_mass": Metric((teacher.exp().sum(-1) * chunks.sizes).sum().detach(), at.sum()),
        }
        if config.nll_weight:
            nll = nll_sum(outputs.logprobs, batch)
            total = total + config.nll_weight * nll
            metrics["nll"] = Metric(nll.detach(), mask.sum())
        return LossSums(total, metrics)
