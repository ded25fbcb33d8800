"""Trainer and engine in turn on one device: forced on a CPU, where the same code moves the same tensors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import nemo_rl
from nemo_rl_core.backends import sealed_file
from nemo_rl_core.errors import ConfigError, InvariantViolation
from nemo_rl_core.training.model.device_turns import DeviceTurns
from nemo_rl_core.training.reporting.record import read_metrics
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_torch_engine.backend import TorchEngine

pytestmark = pytest.mark.xdist_group("device_turns")  # one worker makes what they share

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
EVENTS: list[tuple[str, str]] = []


def reward(response: str) -> float:
    return float(any(c.isdigit() for c in response))


def told(method):
    """The method, which writes (who, what) to EVENTS first."""

    def call(self, *args, **kwargs):
        EVENTS.append((getattr(self, "role", "engine"), method))
        return getattr(TorchEngine if isinstance(self, TorchEngine) else DTensorBackend, method)(self, *args, **kwargs)

    return call


class Trainer(DTensorBackend):
    train_step = told("train_step")
    get_logprobs = told("get_logprobs")
    get_values = told("get_values")
    save_checkpoint = told("save_checkpoint")
    load_checkpoint = told("load_checkpoint")
    export_weights = told("export_weights")
    export_model = told("export_model")
    offload = told("offload")
    reload = told("reload")


class Sharing(TorchEngine):
    generate = told("generate")
    update_weights = told("update_weights")
    sleep = told("sleep")
    wake = told("wake")


class Engine(Sharing):
    """One with weights of its own."""

    capabilities: ClassVar[frozenset[str]] = TorchEngine.capabilities - {"share_weights"}


class NeverLeaves(DTensorBackend):
    capabilities: ClassVar[frozenset[str]] = DTensorBackend.capabilities - {"offload"}


class OutOfMemory(DTensorBackend):
    def reload(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


MOVES = {"offload", "reload", "sleep", "wake"}
USES = {"train_step", "get_logprobs", "get_values", "save_checkpoint", "load_checkpoint", "export_weights"}


def check_turns(events, *, staying=()):
    """Nobody computes on a device that another one has."""
    away, asleep = set(), False
    roles = {who for who, _ in events if who != "engine"} - set(staying)
    for who, what in events:
        if what == "generate":
            assert not asleep, "it samples while it sleeps"
            assert away == roles, f"{roles - away} are on the device while the engine samples"
        elif what in USES:
            assert asleep, f"the engine is awake during {what} of {who}"
            assert who not in away, f"{who} is away during {what}"
            assert what != "train_step" or "reference" in away | set(staying), "a frozen model is there during a step"
        elif what == "update_weights":
            assert asleep
        elif what in ("sleep", "wake"):
            assert what == "sleep" or away == roles, "it wakes before the models have left"
            asleep = what == "sleep"
        elif what in ("offload", "reload"):
            assert asleep or what == "offload", "a model comes back before the engine sleeps"
            (away.add if what == "offload" else away.discard)(who)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    def run(offload, run_dir=None, *, engine=Engine, trainer=Trainer, **changes):
        torch.set_num_threads(1)
        EVENTS.clear()
        config = {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "updates_per_step": 2,
            "reward_kl_beta": 0.05,
            "max_steps": 3,
            "checkpointing": {"every": 1},
            "run_dir": str(run_dir or tmp_path_factory.mktemp("run")),
            "policy": {"max_sequence_length": 32, "backend": trainer},
            "generation": {"max_new_tokens": 4, "backend": engine},
            "validation": {"every": 2, "at_start": True, "at_end": True, "max_samples": 4},
            "logging": {"progress": "none"},
            "cluster": {"offload": offload, "device": "cpu"},
            **changes,
        }
        return nemo_rl.PPOTrainer(config).fit(ROWS, reward, validation_dataset=ROWS)

    return run


@pytest.fixture(scope="module")
def apart(train):
    """A run in which everybody stays."""
    result = train("auto")  # on a CPU nobody leaves
    assert not {what for _, what in EVENTS} & MOVES
    return result


def weights(result, role):
    (file,) = (result.run_dir / "checkpoints" / "step_3" / role).glob("*.pt")
    return sealed_file.read(file)["weights"]


def assert_same_run(mine, other):
    names = ("train/loss", "train/grad_norm", "train/critic/loss", "train/reward_kl", "reward/mean")
    first, second = list(read_metrics(mine.run_dir)), list(read_metrics(other.run_dir))
    assert len(first) == len(second) > 2
    for one, two in zip(first, second, strict=True):
        assert {n: one.get(n) for n in names} == {n: two.get(n) for n in names}
        assert one.get("validation/accuracy") == two.get("validation/accuracy")
    for role in ("policy", "critic"):
        expected = weights(other, role)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(mine, role).items())


@pytest.fixture(scope="module")
def in_turns(train):
    """With a critic, a reference, validation at both ends and in the middle, and a checkpoint after each step."""
    return train("always"), list(EVENTS)


def test_a_run_in_turns_is_the_run_that_stays(in_turns, apart):
    result, events = in_turns
    assert_same_run(result, apart)
    check_turns(events)
    assert {what for _, what in events} >= {*USES - {"load_checkpoint"}, "generate", *MOVES}
    assert sum(what == "generate" for _, what in events) > 3 * 16
    assert all(result.history[-1][f"timing/{name}"] > 0 for name in MOVES)


@pytest.mark.parametrize("what", sorted(MOVES))
def test_an_order_without_one_of_the_moves_is_found(in_turns, what):
    with pytest.raises(AssertionError):
        check_turns([event for event in in_turns[1] if event[1] != what])


def test_a_run_goes_on_in_turns(train, apart, tmp_path):
    train("always", tmp_path, max_steps=2)
    result = train("always", tmp_path)
    check_turns(EVENTS)
    assert ("policy", "load_checkpoint") in EVENTS
    assert_same_run(result, apart)


def test_a_policy_whose_weights_the_engine_uses_stays(train, apart):
    result = train("always", engine=Sharing)
    assert not [event for event in EVENTS if event in (("policy", "offload"), ("policy", "reload"))]
    check_turns(EVENTS, staying={"policy"})
    assert ("engine", "sleep") in EVENTS
    assert_same_run(result, apart)


# -- broken on purpose -------------------------------------------------------------------------------------


def test_a_model_that_does_not_come_back_in_time_ends_the_run(train, monkeypatch):
    monkeypatch.setattr(DeviceTurns, "_use", lambda self, name, **options: None)
    with pytest.raises(InvariantViolation, match="waits in the host's memory"):
        train("always")


def test_no_room_for_a_model_is_told_with_what_to_do(train):
    with pytest.raises(Exception, match=r"role 'policy' does not fit back.*cluster.colocated: false"):
        train("always", trainer=OutOfMemory)


# -- asked for what cannot be ------------------------------------------------------------------------------


def test_a_backend_that_cannot_leave_is_refused(train):
    with pytest.raises(ConfigError, match=r"cluster.offload is always, but .*'policy' \(no 'offload'\)"):
        train("always", trainer=NeverLeaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"staleness": 1}}, "samples while the models train"),
        ({"cluster": {"offload": "always", "colocated": False, "roles": {"policy": 1, "generation": 1}}}, "of its own"),
    ],
)
def test_turns_that_nobody_can_take_are_refused(train, changes, message):
    with pytest.raises(ConfigError, match=message):
        train("always", **changes)
