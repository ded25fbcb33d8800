"""What `finalize` fills in, what it refuses between fields, and that doing it twice changes nothing."""

from __future__ import annotations

import attrs
import pytest
from attrs import field, frozen
from attrs.validators import gt

from nemo_rl_core.config import finalize, load_config, resolve_choice
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import (
    CheckpointConfig,
    ClusterConfig,
    ComponentChoice,
    DataConfig,
    DatasetConfig,
    GenerationConfig,
    InvalidConfig,
    InvariantsConfig,
    OptimizerConfig,
    PolicyConfig,
    RunConfig,
    SchedulerConfig,
    ValidationConfig,
)


def final(config, registry):
    return finalize(config, resolver=registry)


def refused(config, registry):
    with pytest.raises(InvalidConfig) as caught:
        finalize(config, resolver=registry)
    return {m.path: m for m in caught.value.mistakes}


def test_shorthands_and_what_generation_takes_from_the_policy(registry, toy):
    config = final(toy.Config(model="m", learning_rate=3e-4, policy=PolicyConfig(precision="bfloat16")), registry)
    assert config.policy.model_name == "m"
    assert config.policy.optimizer.lr == 3e-4
    assert config.generation.model_name == "m"
    assert config.generation.precision == "bfloat16"
    assert config.generation.max_sequence_length == config.policy.max_sequence_length


def test_finalize_twice_is_finalize_once(registry, toy):
    config = toy.Config(
        model="m",
        learning_rate=1e-4,
        max_steps=10,
        updates_per_step=2,
        policy=PolicyConfig(scheduler=SchedulerConfig(name="cosine"), options={"depth": 3}),
    )
    once = final(config, registry)
    assert final(once, registry) == once


def test_the_schedule_ends_with_the_run_counted_in_optimizer_steps(registry, toy):
    config = toy.Config(
        model="m", max_steps=10, updates_per_step=2, policy=PolicyConfig(scheduler=SchedulerConfig(name="cosine"))
    )
    assert final(config, registry).policy.scheduler.total_steps == 20
    constant = attrs.evolve(config, policy=PolicyConfig())
    assert final(constant, registry).policy.scheduler.total_steps is None


def test_filled_values_follow_a_later_override(registry, toy):
    config = toy.Config(
        model="m", max_steps=10, updates_per_step=2, policy=PolicyConfig(scheduler=SchedulerConfig(name="cosine"))
    )
    changes = {"max_steps": 30, "model": "other", "policy.max_sequence_length": 4096, "policy.precision": "bfloat16"}
    changed = final(load_config(final(config, registry), overrides=changes, resolver=registry), registry)
    assert changed.policy.scheduler.total_steps == 60
    assert changed.policy.model_name == changed.generation.model_name == "other"
    assert changed.generation.max_sequence_length == 4096
    assert changed.generation.precision == "bfloat16"


def test_completions_take_at_most_half_of_the_context(registry, toy):
    short = final(toy.Config(model="m", policy=PolicyConfig(max_sequence_length=100)), registry)
    assert short.generation.max_new_tokens == 50
    longer = final(load_config(short, overrides={"policy.max_sequence_length": 4096}, resolver=registry), registry)
    assert longer.generation.max_new_tokens == 512
    chosen = load_config(short, overrides=["generation.max_new_tokens=7"], resolver=registry)
    longer = load_config(chosen, overrides={"policy.max_sequence_length": 4096}, resolver=registry)
    assert longer.generation.max_new_tokens == 7


def test_a_schedule_that_was_chosen_stays(registry, toy):
    scheduler = SchedulerConfig(name="cosine", total_steps=7)
    config = final(toy.Config(model="m", max_steps=10, policy=PolicyConfig(scheduler=scheduler)), registry)
    changed = load_config(config, overrides=["max_steps=30"], resolver=registry)
    assert changed.policy.scheduler.total_steps == 7


def test_default_backends_are_named_and_their_options_structured(registry, toy):
    config = final(toy.Config(model="m"), registry)
    assert config.policy.backend == "plain"
    assert config.policy.options == toy.BackendOptions()
    assert (config.generation.backend, config.generation.options) == ("sampler", {})
    assert config.loss.options == toy.LossOptions()
    assert config.environment == ComponentChoice()
    assert config.weight_sync == ComponentChoice()  # the run knows where its engines live


def test_a_component_may_be_a_python_object(registry, toy):
    config = toy.Config(model="m", policy=PolicyConfig(backend=toy.Backend, options={"depth": 4}))
    assert final(config, registry).policy.options == toy.BackendOptions(depth=4)


def test_resolve_choice_fills_name_and_options(registry, toy):
    choice, mistakes = resolve_choice(ComponentChoice(), "loggers", resolver=registry)
    assert (choice, mistakes) == (ComponentChoice(name="lines", options=toy.BackendOptions()), [])
    _, mistakes = resolve_choice(ComponentChoice(options={"dept": 1}), "loggers", resolver=registry)
    assert [m.path for m in mistakes] == ["options.dept"]
    _, mistakes = resolve_choice(ComponentChoice(), "environments", resolver=registry)
    assert [(m.path, m.problem) for m in mistakes] == [("name", "Two environments are installed.")]
    assert resolve_choice(ComponentChoice(), "rewards", resolver=registry) == (ComponentChoice(), [])


def test_values_set_in_python_are_checked_as_in_a_file(registry, toy):
    config = toy.Config(
        model="m",
        seed="x",
        policy=PolicyConfig(optimizer=OptimizerConfig(betas=[0.9, 0.95]), options=toy.LossOptions()),
    )
    assert set(refused(config, registry)) == {"seed"}
    fixed = attrs.evolve(config, seed=1)
    assert set(refused(fixed, registry)) == {"policy.options"}
    good = final(attrs.evolve(fixed, policy=attrs.evolve(fixed.policy, options={})), registry)
    assert good.policy.optimizer.betas == (0.9, 0.95)


CASES = [
    (dict(model=None), "policy.model_name", "no model"),
    (dict(generation=GenerationConfig(max_new_tokens=2048)), "generation.max_new_tokens", "2048 new tokens"),
    (dict(validation=ValidationConfig(max_new_tokens=4000)), "validation.max_new_tokens", "4000 new tokens"),
    (dict(generation=GenerationConfig(max_sequence_length=4096)), "generation.max_sequence_length", "4096"),
    (dict(generation=GenerationConfig(model_name="other")), "generation.model_name", "'other'"),
    (dict(policy=PolicyConfig(model_name="other")), "model", "shorthand"),
    (
        dict(learning_rate=1e-4, policy=PolicyConfig(optimizer=OptimizerConfig(lr=1e-3))),
        "learning_rate",
        "policy.optimizer.lr is 0.001",
    ),
    (dict(policy=PolicyConfig(num_workers=3, tensor_parallel_size=2)), "policy.num_workers", "3 workers"),
    (dict(updates_per_step=5), "updates_per_step", "32 rollouts cannot be divided into 5 minibatches"),
    (
        dict(policy=PolicyConfig(scheduler=SchedulerConfig(name="linear"))),
        "policy.scheduler.total_steps",
        "must know when it ends",
    ),
    (
        dict(policy=PolicyConfig(scheduler=SchedulerConfig(warmup_steps=9, total_steps=8))),
        "policy.scheduler.warmup_steps",
        "9 warm-up steps of 8",
    ),
    (dict(checkpointing=CheckpointConfig(keep_best=1)), "checkpointing.metric", "no metric"),
    (dict(invariants=InvariantsConfig(mismatch_warn=3)), "invariants.mismatch_abort", "stop at 2 before it warns at 3"),
    (dict(cluster=ClusterConfig(device="cuda", gpus_per_node=0)), "cluster.gpus_per_node", "0 GPUs"),
    (
        dict(policy=PolicyConfig(num_workers=4), cluster=ClusterConfig(num_nodes=1, gpus_per_node=2)),
        "policy.num_workers",
        "the cluster has 1 x 2",
    ),
    (
        dict(cluster=ClusterConfig(gpus_per_node=4, colocated=False, roles={"policy": 4, "generation": 1})),
        "cluster.roles",
        "need 5 devices (policy 4 + generation 1)",
    ),
    (dict(policy=PolicyConfig(options={"depth": 9, "mode": "graph"})), "policy.options.depth", "8 levels, found 9"),
]


@pytest.mark.parametrize(("values", "path", "words"), CASES)
def test_impossible_arithmetic(registry, toy, values, path, words):
    found = refused(toy.Config(**{"model": "m", **values}), registry)
    assert set(found) == {path}
    assert words in found[path].problem
    assert found[path].fix


def test_arithmetic_is_reported_with_the_other_mistakes_and_its_line(tmp_path, registry):
    path = tmp_path / "a.yaml"
    path.write_text(
        "algorithm: toy\nmodel: m\nupdates_per_step: 5\nsede: 1\npolicy:\n  num_workers: x\n  tensor_parallel_size: 2\n"
    )
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, resolver=registry)
    # The workers cannot be divided either, but that follows from what is wrong already.
    assert [(m.path, m.position.line) for m in caught.value.mistakes] == [
        ("updates_per_step", 3),
        ("sede", 4),
        ("policy.num_workers", 6),
    ]


def test_a_part_can_be_loaded_without_its_checks(registry):
    assert load_config({"algorithm": "toy"}, check=False, resolver=registry).policy.model_name is None


def test_a_validator_that_looks_at_other_fields_reports_its_own_words(registry):
    def above_low(instance, attribute, value):
        if value <= instance.low:
            raise ConfigError(f"high={value} is not above low={instance.low}")

    @frozen(kw_only=True)
    class Bounds(RunConfig):
        low: float = 1.0
        high: float = field(default=2.0, validator=[gt(0), above_low])

    with pytest.raises(InvalidConfig) as caught:
        load_config({"model": "m", "low": 3, "seed": "x"}, config_class=Bounds, resolver=registry)
    assert [(m.path, m.problem) for m in caught.value.mistakes] == [
        ("seed", "expected integer, found 'x'"),
        ("high", "high=2.0 is not above low=3.0"),
    ]


def test_rows_in_python_pass_untouched(registry, toy):
    rows = [{"prompt": "1 + 1", "answer": 2}]
    config = toy.Config(model="m", data=DataConfig(train=DatasetConfig(source=rows)))
    assert final(config, registry).data.train.source is rows
