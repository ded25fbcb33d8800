"""Arithmetic of a configuration: prompts, rollouts and tokens per step, rank and run."""

from __future__ import annotations

import math
from typing import NamedTuple

from nemo_rl_core.config.layouts import replica_sizes
from nemo_rl_core.schema import RunConfig

__all__ = ["ArithmeticRow", "arithmetic"]


class ArithmeticRow(NamedTuple):
    """One derived number."""

    quantity: str
    value: float | None
    """None where it depends on the data."""
    unit: str
    """Of "prompts", "rollouts", "tokens", "steps", "workers", "micro-batches"."""
    why: str
    """How it comes about, with the settings it is made of."""


def arithmetic(config: RunConfig) -> list[ArithmeticRow]:
    """The numbers of one step and of the run, from the data to the rank.

    "At most" rows count every sequence at `policy.max_sequence_length`.
    """
    return [*_step(config), *_workers(config), *_run(config)]


def _step(config: RunConfig) -> list[ArithmeticRow]:
    prompts, group = config.num_items_per_step, config.group_size
    rollouts, updates = prompts * group, config.num_updates_per_step
    trained = rollouts * config.num_passes_per_step
    length = config.policy.max_sequence_length
    return [
        ArithmeticRow(quantity="prompts per step", value=prompts, unit="prompts", why="taken from the data"),
        ArithmeticRow(
            quantity="rollouts per step", value=rollouts, unit="rollouts", why=f"{prompts} prompts x {group} each"
        ),
        ArithmeticRow(
            quantity="rollouts per optimizer step",
            value=trained / updates if trained % updates else trained // updates,
            unit="rollouts",
            why=f"{rollouts} rollouts"
            + (f" x {config.num_passes_per_step} passes" if config.num_passes_per_step > 1 else "")
            + f" / {updates} optimizer step{'s' if updates > 1 else ''}",
        ),
        ArithmeticRow(
            quantity="tokens per step, at most",
            value=rollouts * length,
            unit="tokens",
            why=f"{rollouts} rollouts x policy.max_sequence_length {length}",
        ),
        ArithmeticRow(
            quantity="new tokens per step, at most",
            value=rollouts * (config.generation.max_new_tokens or 0) * config.rollouts.max_turns,
            unit="tokens",
            why=f"{rollouts} rollouts x generation.max_new_tokens {config.generation.max_new_tokens}"
            f" x rollouts.max_turns {config.rollouts.max_turns}",
        ),
    ]


def _workers(config: RunConfig) -> list[ArithmeticRow]:
    policy = config.policy
    sizes = replica_sizes(policy)
    replicas = max(policy.num_workers // math.prod(sizes.values()), 1)
    settings = " x ".join(f"policy.{path} {size}" for path, size in sizes.items())
    rollouts = config.num_items_per_step * config.group_size * config.num_passes_per_step
    per_update = -(-rollouts // config.num_updates_per_step)
    per_replica = -(-per_update // replicas)
    # A sequence never straddles two micro-batches; one longer than the budget goes alone.
    budget = policy.token_budget(config.cluster.device_type())
    per_microbatch = max(budget // policy.max_sequence_length, 1)
    microbatches = -(-per_replica // per_microbatch)
    return [
        ArithmeticRow(
            quantity="model replicas",
            value=replicas,
            unit="workers",
            why=f"policy.num_workers {policy.num_workers} / " + (f"({settings})" if len(sizes) > 1 else settings),
        ),
        ArithmeticRow(
            quantity="rollouts per replica and optimizer step",
            value=per_replica,
            unit="rollouts",
            why=f"{per_update} rollouts / {replicas} replica{'s' if replicas > 1 else ''}",
        ),
        ArithmeticRow(
            quantity="micro-batches per optimizer step, at most",
            value=microbatches,
            unit="micro-batches",
            why=f"{per_replica} rollouts, {per_microbatch} of full length in policy.max_tokens_per_microbatch {budget}",
        ),
        ArithmeticRow(
            quantity="tokens per micro-batch, at most",
            value=max(budget, policy.max_sequence_length),
            unit="tokens",
            why="policy.max_tokens_per_microbatch; a longer sequence goes alone",
        ),
    ]


def _run(config: RunConfig) -> list[ArithmeticRow]:
    steps = config.max_steps
    why = "max_steps" if config.max_epochs is None else f"max_steps, or {config.max_epochs} epoch(s) if that is sooner"
    rows = [
        ArithmeticRow(
            quantity="steps of the run, at most",
            value=steps,
            unit="steps",
            why=why if steps is not None else f"max_epochs {config.max_epochs}: depends on the data",
        )
    ]
    if steps is not None:
        rows.append(
            ArithmeticRow(
                quantity="optimizer steps of the run, at most",
                value=steps * config.num_updates_per_step,
                unit="steps",
                why=f"{steps} steps x {config.num_updates_per_step}",
            )
        )
        rows.append(
            ArithmeticRow(
                quantity="prompts of the run, at most",
                value=steps * config.num_items_per_step,
                unit="prompts",
                why=f"{steps} steps x {config.num_items_per_step}",
            )
        )
    return rows
