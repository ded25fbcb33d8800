"""What the contract of engines does not ask of this one: its processes, options, updates in flight, and errors."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from vllm_kit import SHAPE, complete, generate, largest_difference, needs_vllm, reference_logprobs, request

from nemo_rl_core.errors import ConfigError, DeadlineExceeded, GenerationError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_core.testing.conformance.cases.reference import forward_logits, tiny_model
from nemo_rl_plugins_vllm.arguments import engine_arguments
from nemo_rl_plugins_vllm.backend import VLLMEngine
from nemo_rl_plugins_vllm.config import VLLMConfig

pytestmark = needs_vllm

PROMPT = (20, 31, 42, 53, 64)


def test_a_conversation_reads_its_earlier_turns_from_the_cache(engine, pool):
    prompt = tuple(3 + i % 90 for i in range(300))
    (first,) = complete(engine, request(prompt, seed=1, max_new_tokens=20, ignore_eos=True))
    engine.metrics()
    longer = (*prompt, *first.token_ids, 70, 71)
    (second,) = complete(engine, request(longer, seed=2, max_new_tokens=20, ignore_eos=True))
    assert engine.metrics()["prefix_cached_tokens"] >= 256  # whole blocks of 128
    assert largest_difference(pool.tiny.model, longer, second) < 1e-4


def test_more_seeded_prompts_than_a_batch_holds_are_all_sampled(engine, pool):
    prompts = [(3 + i % 90, *(3 + (i + j) % 90 for j in range(199)), 3 + i // 90) for i in range(64)]  # 12,864 tokens
    found = complete(engine, *(request(p, seed=i, max_new_tokens=2, ignore_eos=True) for i, p in enumerate(prompts)))
    assert all(largest_difference(pool.tiny.model, p, c) < 1e-4 for p, c in zip(prompts, found, strict=True))


@pytest.mark.parametrize("version", [0, 1])
def test_after_an_update_no_old_cache_is_read(engine, pool, version):
    """Not even after one that has the version of the weights before it."""
    prompt = tuple(3 + i % 90 for i in range(300))
    new = pool.tiny.changed_weights()
    complete(engine, request(prompt, seed=1, max_new_tokens=4, ignore_eos=True))
    engine.update_weights(version, iter(new.items()))
    engine.metrics()
    (after,) = complete(engine, request(prompt, seed=1, max_new_tokens=4, ignore_eos=True))
    assert engine.metrics()["prefix_cached_tokens"] == 0
    assert largest_difference(pool.tiny.copy(new), prompt, after) < 1e-4


def test_an_update_changes_fingerprint_and_outputs(engine, pool):
    ask = request(PROMPT, temperature=0.0, max_new_tokens=12, ignore_eos=True)
    new = pool.tiny.changed_weights()
    before, digest = complete(engine, ask)[0], engine.fingerprint()
    assert digest == fingerprint(pool.tiny.weights().items())
    engine.update_weights(1, iter(new.items()))
    assert engine.fingerprint() == fingerprint(new.items()) != digest
    assert complete(engine, ask)[0].token_ids != before.token_ids


@pytest.mark.parametrize("chunk", [1, 20_000, 1 << 30])
def test_pieces_of_any_size_carry_the_same_weights(engine, pool, chunk, monkeypatch):
    from nemo_rl_plugins_vllm import refit

    monkeypatch.setattr(refit, "_MIB", chunk)
    monkeypatch.setattr(engine, "_options", VLLMConfig(refit_chunk_mib=1))
    new = pool.tiny.changed_weights(seed=5)
    engine.update_weights(1, iter(new.items()))
    assert engine.fingerprint() == fingerprint(new.items())
    (found,) = complete(engine, request(PROMPT, seed=1, max_new_tokens=12, ignore_eos=True))
    assert largest_difference(pool.tiny.copy(new), PROMPT, found) < 1e-4


def update_in_flight(engine, weights, *, at_version=1):
    """A completion of 600 tokens during which the weights change."""

    async def run():
        # The others make each step longer, so that the update is in time on a busy machine too.
        asked = [request(PROMPT, seed=seed, max_new_tokens=600, ignore_eos=True) for seed in range(3, 35)]
        calls = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await engine.generate(request(PROMPT, seed=2, max_new_tokens=2, ignore_eos=True))
        try:
            await asyncio.to_thread(engine.update_weights, at_version, iter(weights.items()))
        finally:
            found = await asyncio.wait_for(asyncio.gather(*calls), 60)
        return found[0]

    return asyncio.run(run())


@pytest.mark.parametrize("kept", [True, False])
def test_the_cache_of_requests_in_flight_is_kept_or_computed_again(engine, pool, monkeypatch, kept):
    monkeypatch.setattr(engine, "_options", VLLMConfig(kv_cache_on_update="keep" if kept else "recompute"))
    new = pool.tiny.changed_weights()
    found = update_in_flight(engine, new)
    assert (found.weight_version, found.last_weight_version) == (0, 1)
    assert len(found.token_ids) == len(found.logprobs) == 600
    wanted = reference_logprobs(pool.tiny.copy(new), PROMPT, found.token_ids)
    last = (torch.tensor(found.logprobs) - wanted)[-20:].abs().max()
    # With the cache computed again the end is what the new weights alone predict; an old cache is part of it otherwise.
    assert last > 1e-3 if kept else last < 1e-4


def test_requests_in_flight_go_on_after_an_update_that_could_not_begin(engine, pool, monkeypatch):
    monkeypatch.setattr(engine, "_options", VLLMConfig(refit_timeout_s=0.5))
    monkeypatch.setattr(engine._thread._llm, "start_weight_update", asyncio.Event().wait)
    with pytest.raises(DeadlineExceeded, match="Weight update to version 1 passed its deadline"):
        update_in_flight(engine, pool.tiny.weights())
    assert engine.metrics()["requests"] == 33


def test_a_cancelled_request_leaves_the_engine(engine):
    async def run():
        call = asyncio.ensure_future(engine.generate(request(PROMPT, seed=1, max_new_tokens=900, ignore_eos=True)))
        await engine.generate(request(PROMPT, seed=2, max_new_tokens=2, ignore_eos=True))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        for _ in range(200):
            if engine._thread.idle:
                break
            await asyncio.sleep(0.01)
        return call.cancelled(), engine._thread.idle

    assert asyncio.run(run()) == (True, True)
    metrics = engine.metrics()
    assert metrics["cancelled"] == 1
    assert metrics["requests"] == 1


def test_requests_held_by_a_pause_enter_in_their_order(engine):
    entered = []
    sample = engine._thread._sample

    async def seen(call):
        entered.append(call.order)
        await sample(call)

    async def run():
        engine.pause()
        orders = [(2, 0), (0, 1), (1, 0), (0, 0)]
        calls = [asyncio.ensure_future(engine.generate(request(PROMPT, order=o, max_new_tokens=2))) for o in orders]
        await asyncio.sleep(0.1)
        assert entered == []
        engine.resume()
        await asyncio.gather(*calls)

    engine._thread._sample = seen
    try:
        asyncio.run(run())
    finally:
        engine._thread._sample = sample
    assert entered == [(0, 0), (0, 1), (1, 0), (2, 0)]


def test_no_request_is_served_while_it_sleeps(engine):
    engine.sleep()
    (error,) = generate(engine, request(PROMPT, max_new_tokens=2))
    assert isinstance(error, GenerationError)
    assert "wake()" in str(error)
    engine.wake()
    assert len(complete(engine, request(PROMPT, max_new_tokens=2))) == 1


def test_sleep_gives_the_cache_back(engine):
    """The process that decodes is smaller by what the KV cache held."""
    prompts = [tuple(3 + (i * j) % 90 for i in range(700)) for j in range(1, 40)]
    complete(engine, *(request(p, max_new_tokens=1) for p in prompts))
    sizes = engine._thread.call(_rpc(engine, "nemo_rl_release_cache"), what="release", timeout_s=60)
    assert sizes == [pytest.approx(1 << 28, rel=0.05)]
    engine._thread.call(_rpc(engine, "nemo_rl_restore_cache"), what="restore", timeout_s=60)
    engine._thread.call(engine._thread._llm.reset_prefix_cache(), what="reset", timeout_s=60)
    assert len(complete(engine, request(PROMPT, max_new_tokens=2))) == 1


async def _rpc(engine, name):
    return await engine._thread._llm.collective_rpc(name)


def test_metrics_count_what_was_sampled(engine):
    complete(engine, *(request(PROMPT, seed=i, max_new_tokens=7, ignore_eos=True) for i in range(3)))
    metrics = engine.metrics()
    assert {name: metrics[name] for name in ("requests", "tokens", "prompt_tokens")} == {
        "requests": 3.0,
        "tokens": 21.0,
        "prompt_tokens": 15.0,
    }
    assert 0 < metrics["running"] <= 3
    assert 0 < metrics["kv_cache_usage"] < 1
    assert "tokens" not in engine.metrics()


def test_first_weights_of_a_scratch_model_are_those_of_the_trainer(tmp_path):
    """And a script needs no `if __name__ == "__main__":` for an engine, whose processes import what they are to."""
    note = "import os, pathlib\npathlib.Path(__file__).with_suffix(f'.{os.getpid()}').touch()"
    (tmp_path / "registers_a_model.py").write_text(note)
    script = """
        import asyncio
        import os
        from nemo_rl_core.schema.run import GenerationConfig
        from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
        from nemo_rl_core.protocols.launcher import WorkerContext
        from nemo_rl_plugins_vllm.backend import VLLMEngine
        from nemo_rl_plugins_vllm.config import VLLMConfig

        engine = VLLMEngine()
        options = VLLMConfig(kv_cache_gib=0.1, import_modules=("registers_a_model",))
        config = GenerationConfig(model_name="scratch:qwen2-tiny", options=options)
        engine.setup(config, WorkerContext(seed=3, num_threads=1))
        sampling = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
        print("process", os.getpid())
        print("digest", engine.fingerprint())
        found = asyncio.run(engine.generate(GenerationRequest(request_id="r", prompt_ids=[5, 6, 7], sampling=sampling)))
        print("tokens", found.token_ids)
        engine.shutdown()
    """
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(script),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("process", "digest", "tokens"))
    )
    assert said, done.stderr[-2000:]
    importers = {p.suffix[1:] for p in tmp_path.glob("registers_a_model.[0-9]*")}
    assert importers - {said["process"]}, "no process of vLLM has imported it"
    model = load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=3).eval()
    assert said["digest"] == fingerprint((n, p.detach()) for n, p in model.named_parameters())
    ids = [5, 6, 7]
    for _ in range(6):
        ids.append(int(forward_logits(model, ids)[-1].argmax()))
    assert said["tokens"] == str(ids[3:])


def test_a_trainer_on_the_same_gpu_leaves_the_engine_half_of_it():
    def share(*, shares_device, **options):
        found = engine_arguments(
            VLLMConfig(**options),
            folder=tiny_model(SHAPE).folder,
            precision="bfloat16",
            max_length=100,
            seed=0,
            gpu=True,
            shares_device=shares_device,
        )
        return found.gpu_memory_utilization

    assert (share(shares_device=False), share(shares_device=True)) == (0.9, 0.5)
    assert share(shares_device=True, gpu_memory_utilization=0.3) == 0.3
    assert share(shares_device=True, kv_cache_gib=2.0) < 0.05  # vLLM asks for this much free memory all the same


def set_up(**options):
    VLLMEngine().setup(
        GenerationConfig(model_name="scratch:qwen2-tiny", options=VLLMConfig(**options)), WorkerContext(num_threads=1)
    )


def test_engine_arguments_are_checked_by_name():
    with pytest.raises(ConfigError, match="Did you mean 'max_num_seqs'"):
        set_up(engine_args={"max_num_seq": 3})
    with pytest.raises(ConfigError, match="sets it itself"):
        set_up(engine_args={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(ConfigError, match=r"Set generation\.options\.max_num_seqs instead"):
        set_up(engine_args={"max_num_seqs": 3})


@pytest.mark.parametrize("wrong", [{"max_num_batched_tokens": 100}, {"engine_args": {"enable_chunked_prefill": True}}])
def test_on_a_cpu_no_prompt_is_cut_into_pieces(wrong):
    with pytest.raises(ConfigError, match=r"(?s)is 100.*may have (\d+) tokens.*Set it to \1 or more|Remove it"):
        set_up(**wrong)


def test_what_vllm_refuses_is_an_error_in_its_words():
    with pytest.raises(GenerationError, match=r"(?s)vLLM did not start.*divisible by tensor parallel size"):
        set_up(tensor_parallel_size=3)
