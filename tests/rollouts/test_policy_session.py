"""The policy lent to an environment that asks by itself, without HTTP between them."""

from __future__ import annotations

import asyncio

import pytest
from attrs import evolve

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError, EnvironmentFailure, NemoRLError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.environment import DrivingEnvironment, EnvironmentStep
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.protocols.policy import CallRefused, PolicyCall
from nemo_rl_core.rollouts.agents.session import EngineSession
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing import EnvironmentContract, ScriptedGeneration
from nemo_rl_core.testing.scripted_generation import ScriptedReply


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny")


def session_of(generation, tokenizer, **changes):
    settings = {"sampling": SamplingParams(max_new_tokens=8), "max_sequence_length": 64, "seed": 1, **changes}
    return EngineSession(generation.generate, ChatFormatter(tokenizer), **settings)


class Driver(DrivingEnvironment):
    """Plays what the test gives it."""

    play = None

    async def drive(self, task, seed, policy):
        return await type(self).play(policy)


def rollout_of(generation, tokenizer, play, **limits):
    made = type("Played", (Driver,), {"play": staticmethod(play)})
    engine = RolloutEngine(
        generation=generation,
        environment=lambda context: made({}, context),
        chat=ChatFormatter(tokenizer),
        config=RolloutConfig(**limits),
        sampling=SamplingParams(max_new_tokens=8),
        pool=None,
        seed=0,
        max_sequence_length=64,
    )
    return asyncio.run(engine.run_group(0, "t", {}, group_size=1, weight_version=0)).rollouts[0], engine


def test_only_what_is_recorded_is_the_rollout(tokenizer):
    async def play(policy):
        await policy.ask(PolicyCall(prompt="a"))
        kept = (await policy.ask(PolicyCall(prompt="b"))).record()
        (await policy.ask(PolicyCall(prompt="c"))).record().discard()
        assert kept.choices[0].finish_reason == "stop"
        return EnvironmentStep(rewards={"good": 2.0}, info={"note": 1})

    rollout, engine = rollout_of(ScriptedGeneration("yes", tokenizer), tokenizer, play, max_turns=3)
    ((prompt, sampled),) = rollout.segments
    assert (prompt.message["content"], sampled.message["content"]) == ("b", "yes")
    assert (rollout.rewards, rollout.info, rollout.terminated) == ({"good": 2.0}, {"note": 1}, True)
    assert engine.traffic.count == 0
    assert rollout.timing_s["generation"] <= rollout.timing_s["total"]


def test_a_discarded_call_is_given_back_to_the_turns(tokenizer):
    async def play(policy):
        (await policy.ask(PolicyCall(prompt="a"))).record().discard()
        (await policy.ask(PolicyCall(prompt="a"))).record()
        with pytest.raises(CallRefused, match="has had its 1 calls"):
            await policy.ask(PolicyCall(prompt="b"))
        return EnvironmentStep(rewards={"good": 1.0})

    rollout, _ = rollout_of(ScriptedGeneration("yes", tokenizer), tokenizer, play, max_turns=1)
    assert rollout.error is None and [len(segment) for segment in rollout.segments] == [2]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (PolicyCall(prompt="x" * 64), CallRefused, "leaves no room in a context of 64"),
        (PolicyCall(), DataError, "messages or a prompt"),
        (PolicyCall(prompt=""), DataError, "no tokens"),
        (PolicyCall(prompt="x", n=0), DataError, "n must be"),
    ],
)
async def test_calls_that_cannot_be_taken(tokenizer, call, error, said):
    session = session_of(ScriptedGeneration("yes", tokenizer), tokenizer)
    with pytest.raises(error, match=said):
        await session.ask(call)


async def test_closing_ends_the_calls_under_way_and_takes_no_more(tokenizer):
    generation = ScriptedGeneration(lambda request: ScriptedReply(hang=True), tokenizer)
    session = session_of(generation, tokenizer)
    call = asyncio.create_task(session.ask(PolicyCall(prompt="x", n=2)))
    while generation.num_active < 2:
        await asyncio.sleep(0)
    session.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (generation.num_active, generation.num_cancelled) == (0, 2)
    with pytest.raises(CallRefused, match="no longer accepts calls"):
        await session.ask(PolicyCall(prompt="x"))


def test_an_environment_that_hangs_ends_at_the_deadline_of_its_turns(tokenizer):
    async def play(policy):
        await asyncio.Event().wait()

    limits = {"max_turns": 2, "generation_timeout_s": 0.1, "environment_timeout_s": 0.1}
    rollout, _ = rollout_of(ScriptedGeneration("yes", tokenizer), tokenizer, play, **limits)
    assert "passed its deadline of 0.4 s (rollouts.max_turns x" in rollout.error.message


def test_a_completion_that_cannot_be_trained_on_fails_the_rollout_whatever_is_made_of_it(tokenizer, monkeypatch):
    async def play(policy):
        (await policy.ask(PolicyCall(prompt="a"))).record()
        with pytest.raises(NemoRLError):
            await policy.ask(PolicyCall(prompt="b"))
        return EnvironmentStep(rewards={"reward": 0.0})

    generation = ScriptedGeneration("yes", tokenizer)
    whole = generation.generate

    async def half(request):
        completion = await whole(request)
        return evolve(completion, logprobs=[]) if len(generation.requests) == 2 else completion

    monkeypatch.setattr(generation, "generate", half)
    rollout, _ = rollout_of(generation, tokenizer, play, max_turns=2)
    assert (rollout.error.type, rollout.rewards) == ("GenerationError", {})


def test_what_is_no_step_and_what_is_not_called(tokenizer):
    async def play(policy):
        return 1.0

    rollout, _ = rollout_of(ScriptedGeneration("yes", tokenizer), tokenizer, play)
    assert "drive returned float" in rollout.error.message
    for method in (lambda e: e.reset({}, 0), lambda e: e.step({})):
        with pytest.raises(EnvironmentFailure, match="call drive"):
            method(Driver({}, None))


def test_the_kit_of_episodes_does_not_fit(tokenizer):
    from nemo_rl_core.registry import get_registry

    ref = get_registry().resolve("environments", Driver)
    with pytest.raises(NemoRLError, match="asks the policy itself"):
        EnvironmentContract.from_component(ref, {}, {})
