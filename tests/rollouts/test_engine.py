from __future__ import annotations

import asyncio
import math
import random
import time

import pytest
from attrs import evolve

from nemo_rl_core.protocols.environment import EnvironmentStep
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration, ScriptedReply


class Counting:
    """Asks `num_turns` times; the reward of a turn is 1. Counts what is opened and closed."""

    config_class = dict
    opened = closed = 0

    def __init__(self, context, num_turns=2):
        self.context = context
        self.num_turns = num_turns
        self.turn = 0
        type(self).opened += 1

    def reset(self, task, seed):
        self.seed = seed
        return [{"role": "user", "content": task["prompt"]}]

    def step(self, message):
        self.turn += 1
        return EnvironmentStep(
            messages=[{"role": "user", "content": f"turn {self.turn}"}],
            rewards={"turn": 1.0},
            terminated=self.turn == self.num_turns,
            info={"seed": self.seed},
        )

    def close(self):
        type(self).closed += 1


@pytest.fixture
def counting():
    class Fresh(Counting):
        opened = closed = 0

    return Fresh


def make_broken(base, **overrides):
    return type("Broken", (base,), {**overrides, "opened": 0, "closed": 0})


def test_a_group_in_index_order_with_everything_recorded(make_engine, run_group, counting):
    engine = make_engine("ab", counting, max_turns=4)
    group = run_group(engine, group_id=12, group_size=3, weight_version=5)
    assert (group.group_id, group.task_id, group.weight_version) == (12, "task-12", 5)
    assert [r.index for r in group.rollouts] == [0, 1, 2]
    assert [r.rollout_id for r in group.rollouts] == ["task-12/0", "task-12/1", "task-12/2"]
    for rollout in group.rollouts:
        assert rollout.error is None and rollout.terminated and not rollout.truncated
        assert rollout.rewards == {"turn": 2.0}
        assert [m["role"] for m in rollout.messages] == ["user", "assistant", "user", "assistant", "user"]
        assert set(rollout.timing_s) == {"generation", "environment", "queue", "total"}
        assert all(seconds >= 0 for seconds in rollout.timing_s.values())
    assert counting.opened == counting.closed == 3
    assert engine.num_in_flight == 0


def test_multi_turn_sequences_are_the_rendering_and_masks_cover_exactly_the_sampled_tokens(
    make_engine, run_group, counting, tokenizer
):
    engine = make_engine("ab", counting, max_turns=4)
    batch = batch_from_groups([run_group(engine, group_size=2)])
    text = "<|user|>2+2<|end|><|assistant|>ab<|end|><|user|>turn 1<|end|><|assistant|>ab<|end|>"
    expected = tokenizer.encode(text, add_special_tokens=False)
    for tokens, mask, logprobs in zip(
        batch.unpack("input_ids"), batch.unpack("loss_mask"), batch.unpack("rollout_logprobs"), strict=True
    ):
        assert tokens.tolist() == expected
        assert tokenizer.decode(tokens[mask].tolist()) == "ab<|end|>ab<|end|>"
        sampled = tokenizer.encode("ab<|end|>", add_special_tokens=False)
        once = [ScriptedGeneration.logprob(token, i) for i, token in enumerate(sampled)]
        assert logprobs[mask].tolist() == pytest.approx(once * 2)
        assert logprobs[~mask].abs().sum() == 0


def test_rollouts_of_a_group_share_the_environments_seed_and_differ_in_their_own(make_engine, run_group, counting):
    group = run_group(make_engine("a", counting, max_turns=2), group_size=8)
    assert len({r.info["seed"] for r in group.rollouts}) == 1
    assert len({r.seed for r in group.rollouts}) == 8


def test_sampling_seeds_depend_on_run_group_index_and_turn_only(make_engine, run_group, counting, tokenizer):
    def seeds(seed, group_id):
        generation = ScriptedGeneration("a", tokenizer)
        run_group(make_engine(generation, counting, max_turns=2, seed=seed), group_id=group_id, group_size=3)
        return {request.request_id: request.sampling.seed for request in generation.requests}

    one = seeds(1, 0)
    assert len(set(one.values())) == 6
    assert seeds(1, 0) == one
    assert set(seeds(2, 0).values()).isdisjoint(one.values())
    assert set(seeds(1, 1).values()).isdisjoint(one.values())


def as_records(groups):
    """What must not depend on timing."""
    return [
        [(r.index, r.seed, r.segments, r.rewards, r.terminated, r.truncated, r.error) for r in g.rollouts]
        for g in groups
    ]


def test_groups_are_equal_whatever_the_order_of_completion(make_engine, counting, tokenizer):
    def run(latency_seed):
        latency = random.Random(latency_seed)

        def script(request):
            text = "abcdef"[request.sampling.seed % 6] * (1 + request.sampling.seed % 3)
            return ScriptedReply(text=text, latency_s=latency.random() * 0.02)

        engine = make_engine(ScriptedGeneration(script, tokenizer), counting, max_turns=2, max_in_flight=5)

        async def run_all():
            return await asyncio.gather(
                *(engine.run_group(i, f"t{i}", {"prompt": str(i)}, group_size=4, weight_version=0) for i in range(4))
            )

        return as_records(asyncio.run(run_all()))

    first = run(0)
    assert first == run(1) == run(2)
    assert len({str(r) for g in first for r in g}) == 16


def test_no_more_episodes_than_admitted_and_groups_enter_in_order(make_engine, counting, tokenizer):
    generation = ScriptedGeneration(lambda request: ScriptedReply(text="a", latency_s=0.002), tokenizer)
    engine = make_engine(generation, counting, max_in_flight=3)
    most = 0

    async def run_all():
        async def watch():
            nonlocal most
            while True:
                most = max(most, engine.num_in_flight, len(asyncio.all_tasks()) - 7)
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        await asyncio.gather(
            *(engine.run_group(i, f"t{i}", {"prompt": "2"}, group_size=6, weight_version=0) for i in range(5))
        )
        watching.cancel()

    asyncio.run(run_all())
    assert generation.max_active == 3 and most == 3
    started = [int(request.request_id.split("/")[0]) for request in generation.requests]
    assert started == sorted(started)


@pytest.mark.parametrize(
    ("method", "stage"), [("reset", "reset"), ("step", "step"), ("close", "close")], ids=["reset", "step", "close"]
)
def test_an_environment_that_raises_fails_its_own_rollout_only(make_engine, run_group, counting, method, stage):
    original = getattr(counting, method)
    calls = iter(range(1000))

    def sometimes(self, *args):
        result = original(self, *args)
        if next(calls) == 1:
            raise LookupError("no such thing")
        return result

    broken = make_broken(counting, **{method: sometimes})
    group = run_group(make_engine("a", broken, max_turns=1))
    errors = [r.error for r in group.rollouts if r.error]
    assert [(e.stage, e.type) for e in errors] == [(stage, "LookupError")]
    assert "no such thing" in errors[0].message and "test_engine.py" in errors[0].message
    assert len(group.valid) == 3
    assert broken.opened == broken.closed == 4


def test_an_environment_that_cannot_be_made(make_engine, run_group):
    def factory(context):
        raise OSError("no disk")

    group = run_group(make_engine("a", factory), group_size=2)
    assert [(r.error.stage, r.error.type) for r in group.rollouts] == [("reset", "OSError")] * 2


def test_sys_exit_in_an_environment_is_a_failure_of_the_rollout(make_engine, run_group, counting):
    broken = make_broken(counting, step=lambda self, message: exit(3))
    group = run_group(make_engine("a", broken))
    (error,) = {r.error for r in group.rollouts}
    assert (error.type, error.stage) == ("PluginFailed", "step")
    assert error.origin.endswith("environment step") and error.message.startswith("called sys.exit(3), which")
    assert broken.closed == 4


@pytest.mark.parametrize("method", ["reset", "step", "close"])
def test_a_hanging_environment_is_cut_off_by_name(make_engine, run_group, counting, method):
    async def hang(self, *args):
        type(self).closed += method == "close"
        await asyncio.sleep(60)

    broken = make_broken(counting, **{method: hang})
    group = run_group(make_engine("a", broken, max_turns=1, environment_timeout_s=0.1), group_id=12, group_size=2)
    error = group.rollouts[1].error
    assert (error.stage, error.type) == (method, "DeadlineExceeded")
    assert f"environment {method} of rollout 12/1 passed its deadline of 0.1 s" in error.message
    assert broken.closed == 2


def test_a_step_that_swallows_its_cancellation_still_fails(make_engine, run_group, counting):
    async def stubborn(self, message):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return EnvironmentStep(rewards={"turn": 1.0}, terminated=True)

    group = run_group(make_engine("a", make_broken(counting, step=stubborn), environment_timeout_s=0.1), group_size=1)
    assert group.rollouts[0].error.type == "DeadlineExceeded"


def test_an_environments_own_timeout_error_keeps_its_message(make_engine, run_group, counting):
    async def step(self, message):
        raise TimeoutError("the tool server is slow")

    group = run_group(make_engine("a", make_broken(counting, step=step)), group_size=1)
    assert group.rollouts[0].error.message.startswith("the tool server is slow")


def test_a_stray_cancellation_inside_an_environment_is_its_failure(make_engine, run_group, counting):
    async def step(self, message):
        raise asyncio.CancelledError("a task of mine")

    group = run_group(make_engine("a", make_broken(counting, step=step)), group_size=2)
    assert [r.error.type for r in group.rollouts] == ["EnvironmentFailure"] * 2


def test_hanging_generation_is_cancelled_by_name_and_others_go_on(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration(
        lambda request: ScriptedReply(text="a", hang=request.request_id == "12/task-12/3/0"), tokenizer
    )
    group = run_group(make_engine(generation, counting, generation_timeout_s=0.1), group_id=12)
    assert [r.failed for r in group.rollouts] == [False, False, False, True]
    error = group.rollouts[3].error
    assert (error.stage, error.type) == ("generate", "DeadlineExceeded")
    assert "generation of rollout 12/3 (turn 0) passed its deadline of 0.1 s" in error.message
    assert generation.num_cancelled == 1 and generation.num_active == 0
    assert counting.closed == 4


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (ScriptedReply(text="a", error=RuntimeError("out of blocks")), "out of blocks"),
        (ScriptedReply(token_ids=[5, 1], logprobs=[-1.0]), "2 tokens with 1 logprobs"),
        (ScriptedReply(token_ids=[5, 1], logprobs=[-1.0, math.nan]), "not finite"),
    ],
    ids=["raises", "missing logprob", "nan logprob"],
)
def test_generation_that_cannot_be_used_is_a_recorded_failure(
    make_engine, run_group, counting, tokenizer, reply, message
):
    group = run_group(make_engine(ScriptedGeneration(lambda r: reply, tokenizer), counting), group_size=1)
    error = group.rollouts[0].error
    assert error.stage == "generate" and message in error.message


def test_a_prompt_longer_than_the_context_is_a_recorded_failure(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration("a", tokenizer)
    group = run_group(make_engine(generation, counting, max_sequence_length=10), {"prompt": "1" * 20}, group_size=2)
    error = group.rollouts[0].error
    assert (error.stage, error.type) == ("generate", "GenerationError")
    assert "23 tokens" in error.message and "max_sequence_length" in error.message
    assert generation.requests == [] and counting.closed == 2


def test_completions_are_limited_to_the_room_left(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration("abcdefgh", tokenizer)
    engine = make_engine(generation, counting, max_sequence_length=11, max_turns=3)
    rollout = run_group(engine, group_size=1).rollouts[0]
    assert generation.requests[0].sampling.max_new_tokens == 5  # the prompt has 6
    assert rollout.truncated and not rollout.terminated and not rollout.failed
    assert rollout.segments[0][-2].finish_reason == "length" and rollout.rewards == {"turn": 1.0}


def test_a_full_context_ends_the_episode_as_truncated(make_engine, run_group, counting):
    engine = make_engine("ab", counting, max_sequence_length=18, max_turns=5)
    rollout = run_group(engine, group_size=1).rollouts[0]
    assert rollout.truncated and not rollout.terminated and rollout.error is None
    assert rollout.messages[-1]["content"] == "turn 1" and rollout.segments[0][-1].token_ids == []


def test_the_turn_limit_truncates(make_engine, run_group, counting):
    rollout = run_group(make_engine("ab", counting, max_turns=1), group_size=1).rollouts[0]
    assert rollout.truncated and not rollout.terminated and rollout.num_sampled_tokens == 3


def test_an_empty_completion_is_a_valid_rollout(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration(lambda request: [], tokenizer)
    group = run_group(make_engine(generation, counting, max_turns=1), group_size=2)
    assert [r.failed for r in group.rollouts] == [False, False]
    assert group.rollouts[0].response == "" and group.rewards == [1.0, 1.0]
    batch = batch_from_groups([group])
    assert len(batch) == 2 and batch["loss_mask"].sum() == 0


def test_stop_strings_and_other_sampling_reach_the_engine(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration("ab#cd", tokenizer)
    sampling = SamplingParams(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, stop=("#",), stop_token_ids=(3,), ignore_eos=True
    )
    group = run_group(make_engine(generation, counting, max_turns=1), sampling=sampling, group_size=1)
    sent = generation.requests[0].sampling
    assert evolve(sent, seed=None) == sampling and sent.seed is not None
    assert group.rollouts[0].response == "ab#" and group.rollouts[0].segments[0][1].finish_reason == "stop"


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", [1.0, 2.0]])
def test_rewards_that_are_not_finite_numbers_fail_the_rollout(make_engine, run_group, counting, value):
    broken = make_broken(
        counting, step=lambda self, message: EnvironmentStep(rewards={"good": 1.0, "bad": value}, terminated=True)
    )
    group = run_group(make_engine("a", broken), group_size=2)
    assert [(r.error.stage, r.error.type) for r in group.rollouts] == [("score", "RewardError")] * 2
    assert "'bad'" in group.rollouts[0].error.message
    assert all(r.rewards == {} for r in group.rollouts)


def test_a_step_that_returns_nothing_useful_says_so(make_engine, run_group, counting):
    group = run_group(make_engine("a", make_broken(counting, step=lambda self, message: 1.0)), group_size=1)
    assert "must return an EnvironmentStep" in group.rollouts[0].error.message
    silent = make_broken(counting, step=lambda self, message: EnvironmentStep())
    group = run_group(make_engine("a", silent, max_turns=3), group_size=1)
    assert "no messages and did not end the episode" in group.rollouts[0].error.message


def test_a_rewritten_history_forks_and_trains_both_sequences(make_engine, run_group, counting, tokenizer):
    from nemo_rl_core.data.message_log import ChatFormatter
    from nemo_rl_core.models import load_tokenizer

    own = load_tokenizer("scratch:qwen2-tiny")
    own.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'].split('#')[-1] if m['role'] == 'assistant' else m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    engine = make_engine(ScriptedGeneration("ab#cd", own), counting, max_turns=2)
    object.__setattr__(engine.settings, "chat", ChatFormatter(own))
    group = run_group(engine, group_id=3, group_size=2)
    rollout = group.rollouts[0]
    assert len(rollout.segments) == 2 and rollout.rewards == {"turn": 2.0}
    batch = batch_from_groups([group])
    texts = [own.decode(t.tolist()) for t in batch.unpack("input_ids")]
    assert texts[:2] == [
        "<|user|>2+2<|end|><|assistant|>ab#cd<|end|>",
        "<|user|>2+2<|end|><|assistant|>cd<|end|><|user|>turn 1<|end|><|assistant|>ab#cd<|end|>",
    ]
    trained = [
        own.decode(t[m].tolist()) for t, m in zip(batch.unpack("input_ids"), batch.unpack("loss_mask"), strict=True)
    ]
    assert trained == ["ab#cd<|end|>"] * 4
    assert batch["rollout_index"].tolist() == [0, 0, 1, 1] and batch["group_ids"].tolist() == [3] * 4
    assert batch["rewards"].tolist() == [2.0] * 4 and batch["num_turns"].tolist() == [2] * 4


def test_weight_versions_are_stamped_per_turn(make_engine, run_group, counting, tokenizer):
    generation = ScriptedGeneration("a", tokenizer)

    def script(request):
        reply = ScriptedReply(text="a")
        generation.version += 1
        return reply

    generation._script = script
    rollout = run_group(make_engine(generation, counting, max_turns=2), group_size=1).rollouts[0]
    turns = [t for t in rollout.segments[0] if t.sampled]
    assert [(t.weight_version, t.last_weight_version) for t in turns] == [(0, 1), (1, 2)]
    assert rollout.oldest_weight_version == 0


def test_cancelling_a_group_closes_its_environments_and_frees_its_places(make_engine, counting, tokenizer):
    generation = ScriptedGeneration(lambda request: ScriptedReply(hang=True), tokenizer)
    engine: RolloutEngine = make_engine(generation, counting, max_in_flight=2)

    async def cancel():
        running = asyncio.create_task(engine.run_group(0, "t", {"prompt": "2"}, group_size=5, weight_version=0))
        await asyncio.sleep(0.05)
        assert engine.num_in_flight == 2
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert engine.num_in_flight == 0 and generation.num_active == 0
        generation._script = lambda request: "a"
        return await engine.run_group(1, "t", {"prompt": "2"}, group_size=5, weight_version=0)

    assert len(asyncio.run(cancel()).valid) == 5
    assert counting.opened == counting.closed == 7


def test_time_in_the_pool_does_not_count_for_the_steps_deadline(make_engine, run_group, counting):
    async def step(self, message):
        await self.context.run_in_pool(time.sleep, 0.5, timeout_s=10)
        return EnvironmentStep(rewards={"turn": 1.0}, terminated=True)

    engine = make_engine("a", make_broken(counting, step=step), environment_timeout_s=0.2)
    assert run_group(engine, group_size=2).rewards == [1.0, 1.0]


def test_after_the_pool_the_steps_clock_runs_on(make_engine, run_group, counting):
    async def step(self, message):
        await self.context.run_in_pool(abs, -1)
        await asyncio.sleep(30)

    engine = make_engine("a", make_broken(counting, step=step), environment_timeout_s=0.2)
    assert run_group(engine, group_size=1).rollouts[0].error.type == "DeadlineExceeded"


def test_a_failure_after_a_scored_turn_keeps_no_reward(make_engine, run_group, counting):
    class Late(counting):
        def step(self, message):
            if self.turn == 1:
                raise LookupError("second turn")
            return super().step(message)

    (rollout,) = run_group(make_engine("a", Late, max_turns=3), group_size=1).rollouts
    assert rollout.failed and rollout.rewards == {} and rollout.num_sampled_tokens == 4


def test_a_task_that_comes_again_is_sampled_anew(make_engine, counting):
    engine = make_engine("a", counting)

    async def twice():
        return [
            await engine.run_group(group_id, "same", {"prompt": "2"}, group_size=2, weight_version=0)
            for group_id in (0, 1)
        ]

    seeds = [r.seed for group in asyncio.run(twice()) for r in group.rollouts]
    assert len(set(seeds)) == 4
