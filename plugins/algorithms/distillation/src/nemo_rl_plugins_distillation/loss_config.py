"""Options of the losses."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Attribute, field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema.validators import ge, gt, le, lt, one_of

__all__ = [
    "DivergenceConfig",
    "JensenShannonConfig",
    "MixedKLConfig",
    "ProjectedKLConfig",
    "SortedProbabilitiesConfig",
    "Tail",
]

Tail = Literal["renormalize", "bucket", "zero"]


def _exact_at_temperature(instance: DivergenceConfig, attribute: Attribute[Any], value: float) -> None:
    if value != 1.0 and instance.tail != "renormalize":
        raise ConfigError(
            f"temperature={value} cannot be applied to tail {instance.tail!r}: the mass outside of the top k at "
            "another temperature is not known. Set generation.temperature, which divides all logits of student and "
            "teacher, or tail to 'renormalize'"
        )


@frozen(kw_only=True)
class DivergenceConfig:
    """Options of the losses `forward_kl` and `reverse_kl`."""

    tail: Tail = field(default="renormalize", validator=one_of("renormalize", "bucket", "zero"))
    """What becomes of the mass outside of the teacher's top k. renormalize: student and teacher are each renormalised
    within the k; bucket: the rest is one more token; zero: the teacher has none outside (renormalised within), the
    student keeps its whole distribution."""
    temperature: float = field(default=1.0, validator=[gt(0), _exact_at_temperature])
    """Divides the logits of both once more, beside `generation.temperature`; the loss is multiplied by its square,
    which keeps the size of the gradient."""
    outside_logprob: float = field(default=-100.0, validator=le(0))
    """With tail zero: what stands for the teacher's log(0) where the student has mass."""
    nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of -log p of the tokens themselves, added to the divergence; for given answers."""


@frozen(kw_only=True)
class MixedKLConfig(DivergenceConfig):
    """Options of the loss `mixed_kl`."""

    forward_weight: float = field(default=0.5, validator=[ge(0), le(1)])
    """Weight of the forward KL; the reverse KL has the rest."""


@frozen(kw_only=True)
class JensenShannonConfig(DivergenceConfig):
    """Options of the loss `jensen_shannon`."""

    beta: float = field(default=0.5, validator=[gt(0), lt(1)])
    """Share of the teacher in the mixture; towards 0 the divergence is beta times the forward KL, towards 1 it is
    1 - beta times the reverse KL."""


@frozen(kw_only=True)
class ProjectedKLConfig:
    """Options of the loss `projected_kl`."""

    forward_weight: float = field(default=1.0, validator=[ge(0), le(1)])
    """Weight of KL(teacher | student); KL(student | teacher) has the rest."""
    tail: Literal["renormalize", "bucket"] = field(default="renormalize", validator=one_of("renormalize", "bucket"))
    """renormalize: both are renormalised within the teacher's top k of a chunk; bucket: the rest is one more token."""
    nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of -log p of the tokens themselves."""


@frozen(kw_only=True)
class SortedProbabilitiesConfig:
    """Options of the loss `sorted_probabilities`."""

    match_vocabulary: bool = True
    """Compare tokens of equal text in both vocabularies by KL, and only the others by rank. False compares all by rank
    (ULD as published)."""
    matched_weight: float = field(default=1.0, validator=ge(0))
    """Weight of the KL over matched tokens."""
    sorted_weight: float = field(default=1.0, validator=ge(0))
    """Weight of the distance of the sorted probabilities."""
    nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of -log p of the tokens themselves."""
