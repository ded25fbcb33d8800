"""Weight updates: aliased or copied, checked, stamped."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from attrs import evolve
from torch_engine_kit import complete, generate, reference_logprobs, request

from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_plugins_torch_engine.backend import TorchEngine

ASKED = request([5, 6, 7], max_new_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture
def trained():
    """Another model of the same shape."""
    return load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=9)


@pytest.mark.parametrize("decoder", ["lean", "attention"])
@pytest.mark.parametrize("share", [False, True])
def test_an_update_changes_what_is_sampled_and_its_version(share, decoder, start, trained):
    engine = start(decoder=decoder)
    (before,) = complete(engine, ASKED)
    engine.update_weights(7, trained.named_parameters(), share=share)
    (after,) = complete(engine, ASKED)
    assert (before.weight_version, after.weight_version, after.last_weight_version) == (0, 7, 7)
    assert after.token_ids != before.token_ids
    (expected,) = complete(start(seed=9), ASKED)
    assert after.token_ids == expected.token_ids
    rows = reference_logprobs(engine, [5, 6, 7], after.token_ids)
    assert after.logprobs == pytest.approx(rows[torch.arange(20), torch.tensor(after.token_ids)].tolist(), abs=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_sharing_aliases_the_parameters_and_sees_later_steps(packed, start, trained):
    engine = start(packed_weights=packed)
    engine.update_weights(1, trained.named_parameters(), share=True)
    metrics = engine.metrics()
    assert metrics["refit_bytes"] == 0
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    expected = sum(p.numel() * 4 for n, p in trained.named_parameters() if any(j in n for j in joined))
    assert metrics["packed_bytes"] == (expected if packed else 0)
    ours = dict(engine._model.named_parameters())
    assert all(p.data_ptr() == ours[n].data_ptr() for n, p in trained.named_parameters())
    assert engine._model.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1.5)  # an optimizer step in place
    engine.update_weights(2, trained.named_parameters(), share=True)
    (completion,) = complete(engine, ASKED)
    rows = reference_logprobs(engine, [5, 6, 7], completion.token_ids)
    trained_rows = trained(torch.tensor([[5, 6, 7, *completion.token_ids]])).logits[0].log_softmax(-1)[2:-1]
    assert torch.allclose(rows, trained_rows, atol=1e-5)
    assert completion.weight_version == 2


def test_not_sharing_copies_and_is_left_alone(start, trained):
    engine = start()
    engine.update_weights(1, trained.named_parameters())
    assert engine.metrics()["refit_bytes"] == sum(p.numel() * 4 for p in trained.parameters())
    (before,) = complete(engine, ASKED)
    with torch.no_grad():
        for p in trained.parameters():
            p.zero_()
    assert complete(engine, ASKED)[0].token_ids == before.token_ids


def test_other_types_are_converted_even_when_shared(start, trained):
    engine = start()
    engine.update_weights(1, ((n, p.bfloat16()) for n, p in trained.named_parameters()), share=True)
    weight = engine._model.model.norm.weight
    assert weight.dtype == torch.float32
    assert engine.metrics()["refit_bytes"] > 0


def test_a_tied_weight_may_come_under_either_name(start, trained):
    engine = start()
    renamed = {"model.embed_tokens.weight": "lm_head.weight"}
    engine.update_weights(1, ((renamed.get(n, n), p) for n, p in trained.named_parameters()), share=True)
    assert engine._model.model.embed_tokens.weight.data_ptr() == trained.lm_head.weight.data_ptr()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.layers.7.mlp.weight": torch.zeros(1)}, "no weight 'model.layers.7.mlp.weight'"),
        (lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}, "did not come: .'model.norm.weight'"),
        (lambda w: w | {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' has shape \(3,\), .* needs \(64,\)"),
    ],
)
def test_wrong_names_and_shapes_are_refused(change, message, share, start, trained):
    engine = start()
    (before,) = complete(engine, ASKED)
    weights = dict(trained.named_parameters())
    with pytest.raises(GenerationError, match=message):
        engine.update_weights(1, change({n: p.detach() for n, p in weights.items()}).items(), share=share)
    (result,) = generate(engine, ASKED)
    if share:  # everything was checked before anything was changed
        assert result.token_ids == before.token_ids
        assert result.weight_version == 0
    else:
        with pytest.raises(GenerationError, match="last weight update failed"):
            raise result
    engine.update_weights(2, weights.items(), share=share)
    assert complete(engine, ASKED)[0].weight_version == 2


def test_an_update_in_flight_stamps_both_versions(start, trained):
    engine = start(max_batch_size=1, max_sequence_length=1024)

    async def run():
        running = asyncio.create_task(engine.generate(request([5], max_new_tokens=1000, seed=1, ignore_eos=True)))
        queued = asyncio.create_task(engine.generate(request([5], max_new_tokens=5, seed=1, ignore_eos=True)))
        while not engine._scheduler.counters["tokens"]:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.update_weights, 4, trained.named_parameters())
        return await asyncio.wait_for(asyncio.gather(running, queued), 60)

    running, queued = asyncio.run(run())
    assert (running.weight_version, running.last_weight_version) == (0, 4)
    assert (queued.weight_version, queued.last_weight_version) == (4, 4)
    # nothing that the old weights computed for the equal prompt was used again
    rows = reference_logprobs(engine, [5], queued.token_ids)
    assert queued.logprobs == pytest.approx(rows[torch.arange(5), torch.tensor(queued.token_ids)].tolist(), abs=1e-5)


@pytest.mark.parametrize("decoder", ["lean", "attention", "recompute"])
@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_the_cache_of_requests_in_flight_is_kept_or_computed_anew(cache, decoder, start, trained):
    engine = start(max_sequence_length=512, decoder=decoder, cache_after_refit=cache, max_prefill_tokens=16)
    asked = [request([5, 6 + i], name=str(i), max_new_tokens=400, seed=i, ignore_eos=True) for i in range(3)]

    async def run():
        running = [asyncio.create_task(engine.generate(r)) for r in asked]
        while engine._scheduler.counters["tokens"] < 30:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.update_weights, 4, trained.named_parameters())
        return await asyncio.wait_for(asyncio.gather(*running), 60)

    for r, found in zip(asked, asyncio.run(run()), strict=True):
        assert (found.weight_version, found.last_weight_version) == (0, 4)
        rows = reference_logprobs(engine, r.prompt_ids, found.token_ids)[-5:]
        exact = rows[torch.arange(5), torch.tensor(found.token_ids[-5:])].tolist()
        as_read_anew = found.logprobs[-5:] == pytest.approx(exact, abs=1e-5)
        assert as_read_anew == (cache == "recompute" or decoder == "recompute")  # that decoder has no cache to keep
    assert bool(engine.metrics().get("recomputed_tokens")) == (cache == "recompute")


def test_fingerprint_follows_the_weights(start, trained):
    fingerprint = pytest.importorskip("nemo_rl_core.infra.weights.fingerprint").fingerprint
    engine = start()
    before = engine.fingerprint()
    engine.update_weights(1, trained.named_parameters())
    assert engine.fingerprint() != before
    assert engine.fingerprint() == fingerprint((n, p.detach()) for n, p in trained.named_parameters())


def test_options_given_as_a_mapping_are_taken():
    engine = TorchEngine()
    config = GenerationConfig(model_name="scratch:qwen2-tiny", max_sequence_length=64, options={"max_batch_size": 3})
    engine.setup(config, WorkerContext(num_threads=1))
    assert engine._options.max_batch_size == 3
    engine.shutdown()
    with pytest.raises(ConfigError, match="did you mean `max_batch_size`"):
        TorchEngine().setup(evolve(config, options={"max_bach_size": 3}), WorkerContext())


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_that_comes_amid_an_update_waits_for_its_end(fails, start, trained):
    engine = start()
    asked, answers = threading.Event(), []

    def ask():
        async def work():
            task = asyncio.ensure_future(engine.generate(ASKED))
            while not engine._loop._incoming:
                await asyncio.sleep(0.001)
            asked.set()
            answers.extend(await asyncio.gather(task, return_exceptions=True))

        asyncio.run(work())

    def weights():
        thread.start()
        assert asked.wait(60)
        yield from trained.named_parameters()
        if fails:
            raise ValueError("the trainer died")

    thread = threading.Thread(target=ask)
    if fails:
        with pytest.raises(ValueError, match="the trainer died"):
            engine.update_weights(7, weights())
    else:
        engine.update_weights(7, weights())
    thread.join(60)
    (answer,) = answers
    if fails:
        assert isinstance(answer, GenerationError) and "the last weight update was not finished" in str(answer)
    else:
        assert (answer.weight_version, answer.last_weight_version) == (7, 7)
