"""Checks across fields: combinations of values that are valid alone but not together.

Any configuration class, a plugin's too, may add its own by a method `check(self)` that yields mistakes made
with `mistake(path, problem, fix)`, paths relative to itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import attrs

from nemo_rl_core.config.layouts import replica_sizes
from nemo_rl_core.schema import CheckpointConfig, ClusterConfig, PolicyConfig, RunConfig
from nemo_rl_core.schema.fields import fields_of
from nemo_rl_core.schema.mistakes import Mistake, mistake

__all__ = ["check_tree"]


def check_tree(config: RunConfig) -> list[Mistake]:
    """The mistakes between the fields of a finished configuration."""
    mistakes = [*_length_of_run(config), *_lengths(config)]
    for f in fields_of(type(config)):
        model = getattr(config, f.name)
        if isinstance(model, PolicyConfig):
            sizes = replica_sizes(model)
            mistakes += [*_ranks(f.name, model, config.cluster, sizes), *_filled_by_the_run(f.name, model)]
    mistakes += _roles_of(config.cluster)
    mistakes += _turns(config)
    mistakes += [*_schedule(config), *_checkpoints(config.checkpointing), *_thresholds(config)]
    return [*mistakes, *_evaluation(config), *_own_checks(config)]


def _own_checks(node: object) -> Iterator[Mistake]:
    """What the classes of the tree check themselves."""
    check = getattr(node, "check", None)
    if callable(check):
        yield from check()
    for f in fields_of(type(node)):
        value = getattr(node, f.name)
        for keys, child in (
            [((f.name,), value)]
            if not isinstance(value, tuple)
            else [((f.name, i), item) for i, item in enumerate(value)]
        ):
            if attrs.has(type(child)):
                for m in _own_checks(child):
                    yield m.under(*keys)


def _length_of_run(config: RunConfig) -> Iterator[Mistake]:
    if config.policy.model_name is None:
        fix = "Set `model`, such as `model: Qwen/Qwen2.5-0.5B-Instruct` or a local folder."
        yield mistake("policy.model_name", "no model is chosen", fix, related=["model"])


def _lengths(config: RunConfig) -> Iterator[Mistake]:
    limit = config.policy.max_sequence_length
    generation = config.generation
    fix = "Raise `policy.max_sequence_length`, or lower this; the prompt needs room too."
    sampled = {
        "generation.max_new_tokens": generation.max_new_tokens,
        "validation.max_new_tokens": config.validation.max_new_tokens,
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
    }
    for path, tokens in sampled.items():
        if tokens is not None and tokens >= limit:
            problem = f"{tokens} new tokens leave no room for a prompt in policy.max_sequence_length = {limit}"
            yield mistake(path, problem, fix, related=["policy.max_sequence_length"])
    if generation.max_sequence_length is not None and generation.max_sequence_length > limit:
        problem = (
            f"the engine may make sequences of {generation.max_sequence_length} tokens, "
            f"but the policy trains on at most {limit}"
        )
        fix = "Remove it; it is the policy's."
        yield mistake("generation.max_sequence_length", problem, fix, related=["policy.max_sequence_length"])
    if generation.model_name not in (None, config.policy.model_name):
        problem = f"the engine samples from the policy, {config.policy.model_name!r}, not {generation.model_name!r}"
        yield mistake("generation.model_name", problem, "Remove it.", related=["policy.model_name", "model"])


def _filled_by_the_run(role: str, model: PolicyConfig) -> Iterator[Mistake]:
    if not model.trained:
        problem = "whether a model is trained follows from its role in the algorithm"
        yield mistake(f"{role}.trained", problem, "Remove it.")


def _ranks(role: str, policy: PolicyConfig, cluster: ClusterConfig, sizes: Mapping[str, int]) -> Iterator[Mistake]:
    workers, replica = policy.num_workers, math.prod(sizes.values())
    if workers % replica:
        told = {path.rpartition(".")[2]: size for path, size in sizes.items() if size > 1}
        product = " x ".join(f"{name} = {size}" for name, size in told.items())
        problem = f"{workers} workers cannot be divided into replicas of {product}"
        problem += f", {replica} workers each" if len(told) > 1 else ""
        fix = f"Use a multiple of {replica}, such as {-(-workers // replica) * replica}."
        yield mistake(f"{role}.num_workers", problem, fix, related=[f"{role}.{path}" for path in sizes])
    if not cluster.gpus_per_node or cluster.device == "cpu":
        return
    devices = cluster.num_nodes * cluster.gpus_per_node
    if workers > devices:
        problem = (
            f"{workers} workers need {workers} devices, the cluster has {cluster.num_nodes} x {cluster.gpus_per_node}"
        )
        related = ["cluster.gpus_per_node", "cluster.num_nodes"]
        yield mistake(f"{role}.num_workers", problem, f"Use at most {devices}, or more nodes.", related=related)


def _roles_of(cluster: ClusterConfig) -> Iterator[Mistake]:
    if cluster.device == "cuda" and cluster.gpus_per_node == 0:
        fix = "Set `cluster.device: cpu`, or the number of GPUs."
        yield mistake("cluster.gpus_per_node", "cluster.device is cuda but there are 0 GPUs", fix)
    if not cluster.gpus_per_node or cluster.device == "cpu":
        return
    devices = cluster.num_nodes * cluster.gpus_per_node
    if not cluster.colocated and sum(cluster.roles.values()) > devices:
        total = " + ".join(f"{role} {count}" for role, count in cluster.roles.items())
        problem = f"the roles need {sum(cluster.roles.values())} devices ({total}), the cluster has {devices}"
        yield mistake("cluster.roles", problem, "Lower a role, or add nodes.", related=["cluster.gpus_per_node"])


def _turns(config: RunConfig) -> Iterator[Mistake]:
    """`cluster.offload: always` where nobody can leave, or nobody needs to."""
    cluster = config.cluster
    if cluster.offload != "always":
        return
    fix = "Set `cluster.offload: auto`."
    if config.rollouts.staleness:
        problem = f"with a staleness of {config.rollouts.staleness} the engine samples while the models train"
        related = ["rollouts.staleness"]
        yield mistake("cluster.offload", problem, f"{fix} Or `rollouts.staleness: 0`.", related=related)
    if not cluster.colocated and cluster.roles:
        problem = "each role has devices of its own, so nobody has to leave"
        yield mistake("cluster.offload", problem, fix, related=["cluster.colocated", "cluster.roles"])


def _schedule(config: RunConfig) -> Iterator[Mistake]:
    scheduler = config.policy.scheduler
    if scheduler.name != "constant" and scheduler.total_steps is None and config.max_steps is None:
        problem = f"a {scheduler.name} schedule must know when it ends, but max_steps is not set either"
        fix = "Set `max_steps`, or `policy.scheduler.total_steps` (optimizer steps)."
        yield mistake("policy.scheduler.total_steps", problem, fix, related=["policy.scheduler.name"])
    if scheduler.total_steps is not None and scheduler.warmup_steps > scheduler.total_steps:
        problem = f"{scheduler.warmup_steps} warm-up steps of {scheduler.total_steps} steps in all"
        related = ["policy.scheduler.total_steps", "max_steps"]
        yield mistake("policy.scheduler.warmup_steps", problem, "Lower it.", related=related)


def _checkpoints(checkpointing: CheckpointConfig) -> Iterator[Mistake]:
    if checkpointing.keep_best and checkpointing.metric is None:
        problem = f"the best {checkpointing.keep_best} checkpoints are kept, but no metric ranks them"
        fix = "Set `checkpointing.metric`, such as `validation/accuracy`."
        yield mistake("checkpointing.metric", problem, fix, related=["checkpointing.keep_best"])


def _evaluation(config: RunConfig) -> Iterator[Mistake]:
    evaluation, validation = config.evaluation, config.validation
    own = evaluation.num_generations_per_prompt
    num = validation.num_generations_per_prompt if own is None else own
    related = ["evaluation.num_generations_per_prompt", "validation.num_generations_per_prompt"]
    for name in ("pass_at", "cons_at"):
        for k in getattr(evaluation, name):
            if not 1 <= k <= num:
                problem = f"k={k} of {num} rollouts per prompt is not available"
                fix = f"Set evaluation.num_generations_per_prompt to {k} or more." if k > num else "Use 1 or more."
                yield mistake(f"evaluation.{name}", problem, fix, related=related)
    temperature = validation.temperature if evaluation.temperature is None else evaluation.temperature
    if temperature == 0 and ((own or 1) > 1 or evaluation.num_runs > 1):
        problem = "0 takes the most likely token, so that all rollouts of a prompt are the same"
        fix = "Set evaluation.temperature, such as to 1.0, or sample each prompt once."
        related = ["validation.temperature", *related, "evaluation.num_runs"]
        yield mistake("evaluation.temperature", problem, fix, related=related)
    if evaluation.answer_pattern is not None:
        try:
            re.compile(evaluation.answer_pattern)
        except re.error as error:
            problem = f"{evaluation.answer_pattern!r} is no regular expression: {error}"
            yield mistake("evaluation.answer_pattern", problem, "Mend it; backslashes need single quotes in YAML.")


def _thresholds(config: RunConfig) -> Iterator[Mistake]:
    warn, abort = config.invariants.mismatch_warn, config.invariants.mismatch_abort
    if abort is not None and abort < warn:
        problem = f"the run would stop at {abort:g} before it warns at {warn:g}"
        related = ["invariants.mismatch_warn"]
        yield mistake(
            "invariants.mismatch_abort", problem, "Use a value above mismatch_warn, or null.", related=related
        )
