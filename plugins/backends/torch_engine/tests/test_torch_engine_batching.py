"""Continuous batching: who is in the batch, what is computed once, and how it ends."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch_engine_kit import complete, generate, reference_logprobs, request

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_plugins_torch_engine.backend import TorchEngine


def test_it_is_a_generation_backend_found_by_entry_point():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="nemo_rl.generation_backends", name="torch_engine")
    assert found.load() is TorchEngine
    assert isinstance(TorchEngine(), GenerationBackend)


@pytest.mark.parametrize("decoder", ["lean", "attention"])
def test_200_requests_in_16_rows_all_finish_with_their_lengths(decoder, start):
    engine = start(max_batch_size=16, decoder=decoder, max_prefill_tokens=40)
    requests = [
        request([4 + i % 90, 5 + i % 7] * (1 + i % 11), name=str(i), max_new_tokens=1 + i % 23, seed=i, ignore_eos=True)
        for i in range(200)
    ]
    completions = complete(engine, *requests)
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert [len(c.token_ids) for c in completions] == [r.sampling.max_new_tokens for r in requests]
    assert {c.finish_reason for c in completions} == {"length"}
    for r, c in list(zip(requests, completions, strict=True))[::9]:
        rows = reference_logprobs(engine, r.prompt_ids, c.token_ids)
        expected = rows[torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)].tolist()
        assert c.logprobs == pytest.approx(expected, abs=1e-5)
    metrics = engine.metrics()
    assert metrics["tokens"] == sum(len(c.token_ids) for c in completions)
    assert 0.8 < metrics["batch_fill"] <= 1.0  # who finishes is replaced at once


def test_a_groups_prompt_is_prefilled_once(start):
    engine = start()
    prompts = [[5, 6, 7], [8] * 10]
    complete(engine, *(request(p, max_new_tokens=4, seed=i) for p in prompts for i in range(4)))
    metrics = engine.metrics()
    assert metrics["prefill_tokens"] == 3 + 10
    assert metrics["shared_prefill_tokens"] == 3 * (3 + 10)
    assert metrics["prefill_passes"] == 1
    assert engine.metrics()["prefill_tokens"] == 0 if "prefill_tokens" in engine.metrics() else True


@pytest.mark.parametrize("lengths", [[2, 9, 3, 8, 4, 7, 5, 6], [1, 1, 1, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5]])
def test_a_prompt_is_prefilled_once_though_its_group_does_not_fit(lengths, start):
    engine = start(max_batch_size=3)
    group = [request([5, 6, 7, 8], max_new_tokens=n, seed=i, ignore_eos=True) for i, n in enumerate(lengths)]
    completions = complete(engine, *group)
    assert engine.metrics()["prefill_tokens"] == 4
    big = complete(start(max_batch_size=8), *group)
    assert [c.token_ids for c in completions] == [c.token_ids for c in big]


def test_nothing_of_a_prompt_is_kept_after_its_requests(start):
    engine = start()
    complete(engine, request([5, 6], max_new_tokens=2, ignore_eos=True))
    complete(engine, request([5, 6], max_new_tokens=2, ignore_eos=True))
    assert engine.metrics()["prefill_tokens"] == 4
    assert engine._scheduler._prompts == {}


def test_equal_prompts_in_one_prefill_pass_and_over_its_budget(start):
    prompts = [[i] * 9 for i in range(4, 12)]
    engine = start(max_prefill_tokens=20)
    requests = [request(p, max_new_tokens=5, seed=3, ignore_eos=True) for p in prompts]
    small = complete(engine, *requests)
    assert engine.metrics()["prefill_passes"] == 4  # two prompts fit each
    engine = start(max_prefill_tokens=4)
    assert [c.token_ids for c in complete(engine, *requests)] == [c.token_ids for c in small]
    assert engine.metrics()["prefill_passes"] == 8  # a longer prompt goes alone


def test_the_cache_grows_while_rows_are_in_use(start):
    engine = start(max_sequence_length=700)
    long = request([5], name="long", max_new_tokens=400, seed=1, ignore_eos=True)
    (completion, _, _) = complete(engine, long, request([6] * 300, max_new_tokens=3), request([7], max_new_tokens=9))
    rows = reference_logprobs(engine, [5], completion.token_ids)
    expected = rows[torch.arange(400), torch.tensor(completion.token_ids)].tolist()
    assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_full_context_ends_a_completion(start):
    engine = start(max_sequence_length=12)
    (completion,) = complete(engine, request([5] * 9, max_new_tokens=50, ignore_eos=True))
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5] * 12, {}, "prompt of 12 tokens leaves no room in the context of 12.*max_sequence_length"),
        ([5, 104], {}, "token ids outside of 0..103"),
        ([-1], {}, "token ids outside"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p is 0.0"),
        ([5], {"top_k": -2}, "top_k"),
    ],
)
def test_bad_requests_are_refused_and_others_go_on(prompt, sampling, message, start):
    engine = start(max_sequence_length=12)
    bad, good = generate(engine, request(prompt, name="bad one", **sampling), request([5], max_new_tokens=3))
    with pytest.raises(GenerationError, match=rf"'bad one'.*{message}"):
        raise bad
    assert len(good.token_ids) <= 3


def test_cancelling_frees_the_row(start):
    engine = start(max_batch_size=1, max_sequence_length=1024)

    async def run():
        endless = asyncio.create_task(engine.generate(request([5], max_new_tokens=1000, ignore_eos=True)))
        waiting = asyncio.create_task(engine.generate(request([6], max_new_tokens=900, ignore_eos=True)))
        after = asyncio.create_task(engine.generate(request([7], max_new_tokens=2, ignore_eos=True)))
        await asyncio.sleep(0.05)
        endless.cancel()
        waiting.cancel()
        result = await asyncio.wait_for(after, 30)
        cancelled = await asyncio.gather(endless, waiting, return_exceptions=True)
        return result, cancelled

    result, cancelled = asyncio.run(run())
    assert len(result.token_ids) == 2
    assert all(isinstance(e, asyncio.CancelledError) for e in cancelled)
    assert engine.metrics()["tokens"] < 1000
    assert engine._scheduler._prompts == {}


def test_calls_from_two_event_loops_share_the_engine(start):
    engine = start()
    results = {}

    def work(name):
        results[name] = complete(engine, *(request([5, 6], max_new_tokens=30, seed=i) for i in range(6)))

    threads = [threading.Thread(target=work, args=(n,)) for n in "ab"]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert [c.token_ids for c in results["a"]] == [c.token_ids for c in results["b"]]


def test_an_error_in_a_step_reaches_every_request_and_later_ones(start, monkeypatch):
    engine = start(max_batch_size=2)

    def fail(batch):
        raise ValueError("the model fell over")

    monkeypatch.setattr(engine._scheduler.decoder, "decode", fail)
    errors = generate(engine, *(request([5, i], max_new_tokens=9, ignore_eos=True) for i in range(4, 10)))
    errors += generate(engine, request([5], max_new_tokens=9))
    for error in errors:
        with pytest.raises(GenerationError, match="ValueError: the model fell over"):
            raise error
    with pytest.raises(GenerationError, match="fell over"):
        engine.update_weights(1, engine._model.named_parameters())


def test_non_finite_logits_fail_their_request_only(start):
    engine = start()
    with torch.no_grad():
        head = torch.randn(104, 64)
        head[50] = 0.0  # so that token 50 is never the most likely
        engine._model.lm_head.weight = torch.nn.Parameter(head)
        engine._model.model.embed_tokens.weight[50] = float("nan")
    engine._scheduler.decoder.refresh()
    for _ in range(2):
        good, bad = generate(
            engine, request([5, 6], max_new_tokens=9, seed=1, top_k=1), request([5, 50], name="bad", max_new_tokens=9)
        )
        with pytest.raises(GenerationError, match=r"'bad'.*non-finite"):
            raise bad
        assert not isinstance(good, Exception)
    # the rows that held nan serve others
    later = complete(engine, *(request([5, 7 + i], max_new_tokens=9, top_k=1) for i in range(8)))
    assert all(c.token_ids for c in later)


def test_shutdown_ends_requests_in_flight_and_may_come_twice(start):
    engine = start(max_sequence_length=1024)

    async def run():
        task = asyncio.create_task(engine.generate(request([5], max_new_tokens=1000, ignore_eos=True)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.shutdown)
        return await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 30)

    (error,) = asyncio.run(run())
    assert isinstance(error, GenerationError)
    engine.shutdown()
    assert not engine._loop._thread.is_alive()
    with pytest.raises(GenerationError, match="shut down"):
        complete(engine, request([5]))


def test_before_setup_there_is_a_clear_error():
    engine = TorchEngine()
    engine.shutdown()
    with pytest.raises(GenerationError, match="call setup"):
        complete(engine, request([5]))


def test_sleep_gives_the_cache_back_and_the_engine_goes_on(start):
    engine = start()
    asked = request([5, 6], max_new_tokens=20, seed=1, ignore_eos=True)
    (before,) = complete(engine, asked)
    engine.sleep()
    assert engine._scheduler.decoder.cache.capacity <= 8
    engine.wake()
    assert complete(engine, asked)[0].token_ids == before.token_ids
