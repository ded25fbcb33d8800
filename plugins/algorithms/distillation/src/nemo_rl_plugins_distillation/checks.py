"""Mistakes between the fields of the configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["find_mistakes"]


def find_mistakes(config: Any) -> Iterator[Any]:
    """Yield a `Mistake` of the core for each combination of fields that cannot be meant."""
    from nemo_rl_core.schema import mistake

    if not config.teachers and config.teacher.model_name is None:
        yield mistake("teacher.model_name", "there is no teacher", "set it to a hub name or the folder of a model")
    if config.teachers and config.teacher.model_name is not None:
        yield mistake(
            "teacher.model_name",
            f"both teacher ({config.teacher.model_name}) and teachers ({', '.join(config.teachers)}) are set",
            "put it among teachers, or remove one of the two",
            related=("teachers",),
        )
    for name, teacher in config.teachers.items():
        if teacher.model_name is None:
            yield mistake(f"teachers.{name}.model_name", "it is not set", "set it to a hub name or a folder")
    for name, teacher in config.by_name.items():
        if isinstance(teacher.options, Mapping) and teacher.options.get("lora"):
            where = f"teachers.{name}" if config.teachers else "teacher"
            yield mistake(
                f"{where}.options.lora",
                "a teacher is frozen, so that no adapter is made or loaded for it",
                f"to teach with an adapter, give its folder as {where}.model_name (the base that it names is loaded "
                "and the adapter added), and remove this",
            )
    if "policy" in config.teachers:
        yield mistake("teachers.policy", "`policy` is the name of the student", "give the teacher another name")
    if not any(teacher.weight for teacher in config.by_name.values()):
        yield mistake("teacher.weight", "every teacher has weight 0", "give one of them a weight")
    if config.teacher_column is not None and not config.teachers:
        yield mistake(
            "teacher_column",
            f"the column {config.teacher_column!r} is to choose among teachers, and there is one",
            "name several under teachers, or remove it",
        )
    yield from _mistakes_of_sampling(config)
    if not hasattr(config, "projection"):
        return
    if config.teachers:
        yield mistake("teachers", "a cross-tokenizer run has one teacher", "set teacher in place of teachers")
    if config.top_k is None:
        yield mistake(
            "top_k",
            "whole vocabularies can only be compared if they are the same, and the teacher has another tokenizer",
            "set it to a number, such as 64",
        )


def _mistakes_of_sampling(config: Any) -> Iterator[Any]:
    """What does not go with steps on the answers of the data."""
    from nemo_rl_core.schema import mistake

    lmbda = getattr(config, "lmbda", 1.0)
    if lmbda == 1:
        return
    if lmbda > 0 and config.rollouts.staleness:
        yield mistake(
            "rollouts.staleness",
            f"lmbda is {lmbda}, so that which step samples is drawn step by step, and nothing is sampled ahead",
            "set it to 0, or lmbda to 1",
        )
    if hasattr(config, "advantage") and config.advantage.name is not None:
        yield mistake(
            "lmbda",
            f"{lmbda} trains on answers that nobody sampled, and a policy gradient needs sampled ones",
            "set it to 1, or choose a loss that compares distributions and remove advantage",
        )
