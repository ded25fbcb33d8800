"""Distributions over different vocabularies compared by rank.

Legend: N tokens, M trained ones that belong to a chunk, C chunks, K ids.
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
from nemo_rl_plugins_distillation.conformance import add_sorted_teacher
from nemo_rl_plugins_distillation.forward_kl import forward_kl
from nemo_rl_plugins_distillation.loss_config import SortedProbabilitiesConfig
from nemo_rl_plugins_distillation.support import on_support

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["SortedProbabilitiesLoss"]


class SortedProbabilitiesLoss:
    """L1 distance of descending probabilities, and KL over the tokens that both vocabularies have.

    Source: universal logit distillation, arXiv:2402.12030 (`match_vocabulary: false`); the split into matched and other
    tokens as in GOLD. Departures: both are cut at the top k, chunks take the mean over their positions, and the KL has
    the unmatched rest as one more token, so that it stays a KL.

    It reads `top_ids` [N, 2, K] (the student's ids of the teacher's likeliest tokens; the student's own likeliest),
    `teacher_top_logprobs` [N, K] of the former, `student_unmatched` [N, K] bool of the latter, `teacher_sorted` [N, K],
    the teacher's unmatched probabilities, and `chunk_ids` [N].
    """

    config_class: ClassVar[type] = SortedProbabilitiesConfig
    denominator: Denominator = "tokens"
    conformance: ClassVar[Mapping[str, Any]] = {"add_fields": add_sorted_teacher}

    def __init__(self, config: Any = None) -> None:
        self.config: SortedProbabilitiesConfig = config if config is not None else SortedProbabilitiesConfig()
        self.needs = frozenset({"top_logprobs", "logprobs"} if self.config.nll_weight else {"top_logprobs"})
        matched = {"matched_teacher"} if self.config.match_vocabulary else set()
        self.required_fields = frozenset({"sorted_teacher", *matched})

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the chunks of one micro-batch; a chunk counts as many times as it has tokens of the student.

        Raises:
            ShapeMismatch: The student's logprobs are not of both kinds of tokens.
        """
        student = outputs.top_logprobs
        if student is None or student.shape != batch["top_ids"].shape or student.ndim != 3:
            shape = None if student is None else list(student.shape)
            raise ShapeMismatch(f"outputs.top_logprobs has shape {shape}, top_ids {list(batch['top_ids'].shape)}.")
        chunks, mask, config = Chunks.of(batch), batch["loss_mask"], self.config
        at = chunks.selected
        both = student[at].exp()
        teacher = chunks.mean(batch["teacher_top_logprobs"][at].to(both.dtype))
        mean = chunks.mean(both[:, 0]).clamp(min=torch.finfo(both.dtype).tiny).log()
        mean = mean.masked_fill(teacher <= NEVER / 2, NEVER)
        matched = forward_kl(on_support(mean[:, None], teacher[:, None], tail="bucket"))[:, 0]
        own = (both[:, 1] * batch["student_unmatched"][at]).sort(-1, descending=True).values
        distance = (chunks.mean(own) - chunks.mean(batch["teacher_sorted"][at].to(own.dtype))).abs().sum(-1)
        sums = {"matched_kl": (matched * chunks.sizes).sum(), "sorted_distance": (distance * chunks.sizes).sum()}
        total: Tensor = config.matched_weight * sums["matched_kl"] + config.sorted_weight * sums["sorted_distance"]
        metrics = {name: Metric(value.detach(), mask.sum()) for name, value in sums.items()}
        metrics["aligned_fraction"] = Metric(at.sum(), mask.sum())
        if config.nll_weight:
            nll = nll_sum(outputs.logprobs, batch)
            total = total + config.nll_weight * nll
            metrics["nll"] = Metric(nll.detach(), mask.sum())
        return LossSums(total, metrics)
