"""The contract of an algorithm.

Its batches are looked at with rollouts made by hand; then it is run, with the default backends that are installed,
on a task that a model of 0.1 million parameters learns in seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext, ModelRole, Update, feed_of
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.testing.conformance.cases.algorithm_case import AlgorithmCase, StandIn, handmade_groups, is_sampled
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract

if TYPE_CHECKING:
    from nemo_rl_core.records.run_state import RunResult
    from nemo_rl_core.registry import ComponentRef

__all__ = ["AlgorithmContract"]

REQUIRED_FIELDS = frozenset({"logprobs", "ref_logprobs"})
_SMALL = {"num_prompts_per_step": 8, "num_generations_per_prompt": 8, "batch_size": 8}
"""Sizes of a step that the kit sets where the configuration has a field of the name."""


class AlgorithmContract(Contract):
    """What every algorithm must do. Define the fixture `algorithm`: the class, or an `AlgorithmCase`.

    Attributes:
        model_name: What is trained.
        learning_rate: Of the runs.
        learning_steps: Steps in which it must learn.
        reward_margin: By how much the mean reward must rise (feed "rollouts").
        loss_margin: Share of the first loss by which it must fall (feed "examples").
        tolerance: Largest difference of a weight between runs with other micro-batches.
    """

    kind: ClassVar[str] = "algorithms"
    subject: ClassVar[str] = "algorithm"
    model_name: ClassVar[str] = "scratch:qwen2-tiny"
    learning_rate: ClassVar[float] = 1e-2
    learning_steps: ClassVar[int] = 15
    reward_margin: ClassVar[float] = 0.25
    loss_margin: ClassVar[float] = 0.2
    tolerance: ClassVar[float] = 1e-3

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> AlgorithmCase:
        """Return the case of an algorithm with these options; its `example` has keywords of `AlgorithmCase`."""
        config = overlaid(example.get("config") or {}, options)
        case = AlgorithmCase(**{"component": ref.load(), **example, "config": config})
        cls().config(case)  # wrong or missing fields are one error
        return case

    @classmethod
    def declared_by(cls, subject: object) -> object:
        """Return the class of the algorithm."""
        return getattr(subject, "component", subject)

    @pytest.fixture
    def algorithm(self) -> type:
        """The component class under test, or an `AlgorithmCase`."""
        pytest.fail(f"{type(self).__name__} must define a fixture `algorithm` that returns the class to test.")

    @pytest.fixture
    def case(self, algorithm: type[Algorithm] | AlgorithmCase) -> Iterator[AlgorithmCase]:
        """The algorithm and its run, in one thread: more only get in each other's way in a model this small."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield algorithm if isinstance(algorithm, AlgorithmCase) else AlgorithmCase(component=algorithm)
        torch.set_num_threads(threads)

    # -- what it says of itself ----------------------------------------------------------------

    def test_config(self, case: AlgorithmCase) -> None:
        """`config_class` is an attrs class that extends `RunConfig`, with a known arithmetic of its step."""
        found = case.component.config_class
        root = isinstance(found, type) and attrs.has(found) and issubclass(found, RunConfig)
        assert root, f"config_class is {found!r}, not an attrs class that extends RunConfig"
        config = self.config(case)
        assert type(config) is found, f"`algorithm:` gives a configuration of {type(config).__name__}"
        for name in ("num_items_per_step", "num_updates_per_step", "num_passes_per_step", "group_size"):
            value = getattr(config, name)
            assert isinstance(value, int) and value >= 1, f"{name} of the configuration is {value!r}, not a count"

    def test_config_mistakes(self, case: AlgorithmCase) -> None:
        """A misspelled field of its configuration is a ConfigError that names it."""
        try:
            self.config(case, num_promts_per_stepp=3)
        except ConfigError as error:
            assert "num_promts_per_stepp" in str(error), f"the error does not name the field: {error}"
        else:
            pytest.fail("it took a field that it does not have: num_promts_per_stepp")

    def test_declares_itself(self, case: AlgorithmCase) -> None:
        """Its feed and required fields are known ones, its models `ModelRole`s; its loss declares what it needs."""
        made = self.make(case)
        assert made.feed in ("rollouts", "examples"), f"feed is {made.feed!r}, neither 'rollouts' nor 'examples'"
        models, fields = made.models, set(made.required_fields)
        for name, role in models.items():
            assert isinstance(role, ModelRole), f"models[{name!r}] is {role!r:.60}, not a ModelRole"
            assert name != "policy", "models names the policy, which every run has"
        unknown = sorted(fields - REQUIRED_FIELDS)
        assert not unknown, f"required_fields has {unknown}; known are {sorted(REQUIRED_FIELDS)}"
        needed = "ref_logprobs" not in fields or "reference" in models
        assert needed, "it requires ref_logprobs and its models have no 'reference'"
        for name in ("denominator", "needs"):
            assert hasattr(made.loss, name), f"its loss {made.loss!r} declares no `{name}`"

    # -- batches -------------------------------------------------------------------------------

    def test_batch_fields(self, case: AlgorithmCase) -> None:
        """`build_batch` gives input_ids and loss_mask; for rollouts also their logprobs, rewards and group_ids."""
        made = self.make(case)
        batch = made.build_batch(self.items(case, made))
        wanted = {"input_ids", "loss_mask"}
        if _fed(made) == "rollouts":
            wanted |= {"rollout_logprobs", "rewards", "group_ids"}
        missing = sorted(wanted - batch.field_names)
        assert not missing, f"the batch lacks {missing}; it has {sorted(batch.field_names)}"
        assert batch["loss_mask"].dtype == torch.bool, f"loss_mask is {batch['loss_mask'].dtype}, not bool"
        assert batch["input_ids"].dtype == torch.int64, f"input_ids is {batch['input_ids'].dtype}, not int64"
        first = batch["loss_mask"][batch.position_ids == 0]
        assert not first.any(), f"{int(first.sum())} first tokens, which nothing predicts, are in loss_mask"
        assert batch["loss_mask"].any(), "loss_mask selects nothing"

    def test_trained_tokens(self, case: AlgorithmCase) -> None:
        """`loss_mask` selects exactly the tokens that the policy sampled, or that the row is to teach."""
        made = self.make(case)
        items = self.items(case, made)
        batch = made.build_batch(items)
        if _fed(made) == "rollouts":
            sampled = torch.tensor([is_sampled(token) for token in batch["input_ids"].tolist()])
            beside, missed = batch["loss_mask"] & ~sampled, sampled & ~batch["loss_mask"]
            assert not beside.any(), f"{int(beside.sum())} tokens that the policy did not sample are trained"
            assert not missed.any(), f"{int(missed.sum())} tokens that the policy sampled are not trained"
            return
        if case.target is None:
            pytest.skip("the case names no target of a row")
        tokenizer = load_tokenizer(self.model_name)
        assert len(batch) == len(items), f"{len(items)} rows gave {len(batch)} sequences; set the case's target to None"
        rows = zip(items, batch.unpack("input_ids"), batch.unpack("loss_mask"), strict=True)
        for row, ids, mask in rows:
            found = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True).strip()
            target = case.target(row).strip()
            assert found == target, f"of a row whose target is {target!r} it trains {found!r}"
            ends = not case.teaches_end or int(ids[mask][-1]) == tokenizer.eos_token_id
            assert ends, "it does not train the end of the sequence; if that is meant, set the case's teaches_end"

    def test_batch_of_rollouts(self, case: AlgorithmCase) -> None:
        """Every rollout that did not fail is in the batch, with its tokens, logprobs and group; no other is."""
        made = self.make(case)
        self.only_rollouts(made)
        groups = handmade_groups()
        wanted = sorted(tuple(t for turn in r.segments[0] for t in turn.token_ids) for g in groups for r in g.valid)
        batch = made.build_batch(groups)
        found = sorted(tuple(ids.tolist()) for ids in batch.unpack("input_ids"))
        assert found == wanted, (
            f"the batch has {len(found)} sequences, not those of the {len(wanted)} rollouts that did not fail"
        )
        mask, ids = batch["loss_mask"], batch["input_ids"]
        worst = (batch["rollout_logprobs"][mask] + ids[mask] / 100).abs().max()
        assert worst < 1e-5, f"a logprob of the engine is {worst:.3g} off the one of its token"
        owner = ids[batch.offsets[:-1]]
        same_owner, same_group = owner[:, None] == owner, batch["group_ids"][:, None] == batch["group_ids"]
        assert torch.equal(same_owner, same_group), "group_ids does not part the rollouts by their prompt"

    def test_finish_batch(self, case: AlgorithmCase) -> None:
        """`finish_batch` gives finite metrics, and advantages that are finite and 0 outside of `loss_mask`."""
        made, batch, metrics = self.finished(case)
        for name, value in metrics.items():
            assert math.isfinite(float(value)), f"metric {name!r} is {value}"
        if _fed(made) == "rollouts" and "advantages" in batch.field_names:
            found: Tensor = batch["advantages"]
            assert found.is_floating_point() and not found.requires_grad, "advantages are integers or carry a gradient"
            assert torch.isfinite(found).all(), "an advantage is not finite"
            outside = int((found[~batch["loss_mask"]] != 0).sum())
            assert outside == 0, f"{outside} tokens outside of loss_mask have an advantage"
        sampled = self.make(case).build_batch(self.items(case, made))["loss_mask"]
        added = int((batch["loss_mask"] & ~sampled).sum())
        assert added == 0, f"finish_batch added {added} tokens to loss_mask"

    def test_minibatches(self, case: AlgorithmCase) -> None:
        """`minibatches` has every sequence equally often, in as many steps as the configuration says."""
        made, batch, _ = self.finished(case)
        parts = [list(part) for part in made.minibatches(batch)]
        counts = torch.bincount(torch.tensor([i for part in parts for i in part]), minlength=len(batch))
        assert len(counts) == len(batch), f"it names sequence {len(counts) - 1} of a batch of {len(batch)}"
        assert int(counts.min()) >= 1, f"{int((counts == 0).sum())} sequences are in no minibatch"
        assert int(counts.min()) == int(counts.max()), f"sequences are trained unequally often: {counts.tolist()}"
        limit = self.config(case).num_updates_per_step
        assert 1 <= len(parts) <= max(limit, 1), f"it makes {len(parts)} steps; num_updates_per_step is {limit}"

    def test_updates(self, case: AlgorithmCase) -> None:
        """`updates` trains the policy and those of its models that are to be trained, on sequences of the batch."""
        made, batch, _ = self.finished(case)
        trainable = {"policy", *(name for name, role in made.models.items() if role.trained)}
        updates = made.updates(batch)
        for update in updates:
            assert isinstance(update, Update), f"updates has {update!r:.60}, not an Update"
            assert update.model in trainable, f"it trains {update.model!r}; trained models are {sorted(trainable)}"
            inside = all(0 <= i < len(batch) for i in update.indices)
            assert inside, f"it trains on sequences {list(update.indices)} of a batch of {len(batch)}"
        missing = sorted(trainable - {update.model for update in updates})
        assert not missing, f"no update is of {missing}"

    def test_keep_group(self, case: AlgorithmCase) -> None:
        """`keep_group` answers True or False, the same each time, and changes nothing of the group."""
        made = self.make(case)
        self.only_rollouts(made)
        for group in handmade_groups():
            before = copy.deepcopy(group)
            first, second = made.keep_group(group), made.keep_group(group)
            assert isinstance(first, bool), f"it answered {first!r}"
            assert first == second, f"it answered {first} and then {second} for one group"
            assert group == before, "it changed the group"

    def test_items_are_left_alone(self, case: AlgorithmCase) -> None:
        """`build_batch` changes no group and no row, and gives the same batch again."""
        made = self.make(case)
        items = self.items(case, made)
        before = copy.deepcopy(list(items))
        first, second = made.build_batch(items), made.build_batch(items)
        assert list(items) == before, "it changed what the batch is built from"
        for name in ("input_ids", "loss_mask"):
            assert torch.equal(first[name], second[name]), f"built twice, the batches differ in `{name}`"

    # -- runs ----------------------------------------------------------------------------------

    def test_learns(self, case: AlgorithmCase, tmp_path: Path) -> None:
        """It learns a tiny task: the reward rises, or the loss falls, by the stated margin."""
        history = self.run(case, tmp_path / "run", max_steps=self.learning_steps).history
        sampled = all("reward/mean" in entry for entry in history)  # else some steps, or all, took rows
        name, wanted = ("reward/mean", "rise") if sampled else ("train/loss", "fall")
        values = [entry[name] for entry in history]
        first, last = sum(values[:2]) / 2, sum(values[-3:]) / 3
        told = f"`{name}` went from {first:.3f} to {last:.3f} in {len(values)} steps"
        if wanted == "rise":
            assert last - first >= self.reward_margin, f"{told}; it must rise by {self.reward_margin}"
        else:
            fell = first > last and first - last >= self.loss_margin * abs(first)
            assert fell, f"{told}; it must fall by {self.loss_margin:.0%}"

    def test_first_step_is_on_policy(self, case: AlgorithmCase, tmp_path: Path) -> None:
        """On the first step the ratio of the policy to the one that sampled is 1, and nothing is clipped."""
        self.only_rollouts(self.make(case))
        (metrics,) = self.run(case, tmp_path / "run", max_steps=1).history
        known = [n for n in ("train/probs_ratio", "train/token_mult_prob_error") if n in metrics]
        if not known or self.config(case).num_updates_per_step > 1:
            pytest.skip("its metrics have no ratio, or a step takes several updates")
        for name in known:
            assert abs(metrics[name] - 1.0) < 1e-3, f"`{name}` is {metrics[name]:.6f} on the first step, not 1"
        assert metrics.get("train/clip_fraction", 0.0) == 0.0, "tokens are clipped on the first step"

    def test_resumes(self, case: AlgorithmCase, tmp_path: Path) -> None:
        """Stopped after two steps and resumed for two more, it is bit for bit the run that was not stopped."""
        whole = self.run(case, tmp_path / "whole", max_steps=4)
        self.run(case, tmp_path / "parts", max_steps=2)
        resumed = self.run(case, tmp_path / "parts", max_steps=4)
        steps = [int(entry["step"]) for entry in resumed.history]
        assert steps == [1, 2, 3, 4], f"the resumed run has the steps {steps}"
        for mine, other in zip(resumed.history, whole.history, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                same = mine[name] == other[name]
                assert same, f"`{name}` of step {int(mine['step'])} is {mine[name]!r}; uninterrupted {other[name]!r}"
        same = _model_bytes(resumed) == _model_bytes(whole)
        assert same, "the weights differ from those of the run that was not stopped"

    def test_micro_batches(self, case: AlgorithmCase, tmp_path: Path) -> None:
        """The token budget of micro-batches changes neither the loss nor the step that is taken."""
        runs = [
            self.run(case, tmp_path / str(budget), max_steps=1, policy={"max_tokens_per_microbatch": budget})
            for budget in (10_000, 40)
        ]
        losses = [run.history[0]["train/loss"] for run in runs]
        assert math.isclose(*losses, rel_tol=1e-3, abs_tol=1e-5), f"with other micro-batches the loss is {losses}"
        first, second = (_weights(run) for run in runs)
        worst = max(float((first[name] - second[name]).abs().max()) for name in first)
        assert worst <= self.tolerance, f"with other micro-batches a weight differs by {worst:.3g} after one step"

    # -- making and running --------------------------------------------------------------------

    def settings(self, case: AlgorithmCase, **changes: object) -> dict[str, Any]:
        """Return the configuration as plain data: the kit's settings, overlaid by the case's and then by `changes`."""
        fields = {field.name for field in attrs.fields(case.component.config_class)}
        small = {name: value for name, value in _SMALL.items() if name in fields}
        settings: dict[str, Any] = {
            "algorithm": case.component,
            "model": self.model_name,
            "learning_rate": self.learning_rate,
            "policy": {"max_sequence_length": 64, "optimizer": {"eps": 1e-5}},
            "generation": {"max_new_tokens": 4},
            "logging": {"progress": "none"},
            "cluster": {"device": "cpu"},
            **small,
        }
        for layer in (case.config, changes):
            settings = overlaid(settings, layer)
        return settings

    def config(self, case: AlgorithmCase, **changes: object) -> RunConfig:
        """Return the finalized configuration."""
        return finalize(load_config(self.settings(case, **changes)))

    def make(self, case: AlgorithmCase) -> Algorithm:
        """Make the algorithm, with the components that its configuration names."""
        tokenizer, resolve = load_tokenizer(self.model_name), RunComponents().build
        context = AlgorithmContext(tokenizer=tokenizer, resolve=resolve, max_sequence_length=64)
        make: Callable[..., Algorithm] = case.component
        return make(self.config(case), context)

    def items(self, case: AlgorithmCase, made: Algorithm) -> Sequence[Any]:
        """Return what a batch is built from: groups made by hand, or rows of the case."""
        return handmade_groups() if _fed(made) == "rollouts" else list(case.rows)[:8]

    def finished(self, case: AlgorithmCase) -> tuple[Algorithm, BatchedDataDict, Mapping[str, float]]:
        """Return an algorithm, a batch that is ready for training, and the metrics of `finish_batch`."""
        made = self.make(case)
        batch = made.build_batch(self.items(case, made))
        made.fill_batch(batch, {"policy": StandIn(0.0), **{name: StandIn(0.1) for name in made.models}})
        return made, batch, made.finish_batch(batch)

    def only_rollouts(self, made: Algorithm) -> None:
        """Skip the clause for an algorithm that is fed with examples."""
        if _fed(made) != "rollouts":
            pytest.skip("it is fed with examples")

    def run(self, case: AlgorithmCase, run_dir: Path, **changes: object) -> RunResult:
        """Train with the default backends and return the result of the run."""
        from nemo_rl_core.training.trainer import Trainer

        trainer = Trainer(self.settings(case, run_dir=str(run_dir), **changes))
        if feed_of(case.component, self.config(case)) != "rollouts":
            return trainer.fit(list(case.rows))
        scored = {"environment": case.environment} if case.environment is not None else {"reward_fn": case.reward}
        return trainer.fit(list(case.rows), **scored)


def _fed(made: Algorithm) -> str:
    return feed_of(made, getattr(made, "config", None))


def _model_bytes(run: RunResult) -> bytes:
    assert run.model_path is not None, f"the run is {run.status} and wrote no model"
    return b"".join(path.read_bytes() for path in sorted(run.model_path.glob("*.safetensors")))


def _weights(run: RunResult) -> dict[str, Tensor]:
    """Read the weights of the model that a run wrote, by name, each [...] of its own shape."""
    from safetensors.torch import load_file

    assert run.model_path is not None, f"the run is {run.status} and wrote no model"
    return {k: v for path in sorted(run.model_path.glob("*.safetensors")) for k, v in load_file(path).items()}
