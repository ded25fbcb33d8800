"""Runs whose rollouts vLLM samples, with both trainers, here and on Ray: the engine is the trainer's policy."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import ClusterConfig, GenerationConfig, PolicyConfig, RunConfig
from nemo_rl_core.testing.conformance.cases.reference import forward_logits
from nemo_rl_core.training.setup.engine import engine_placement, start_engine

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Runs, check_pair, check_same_first_step, check_same_run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.xdist_group("vllm"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def run(runs):
    """Five steps of GRPO on `dtensor` and `vllm`."""
    return runs("dtensor", "vllm", "local")


@pytest.mark.parametrize("launcher", ["local", "ray"])
@pytest.mark.parametrize("training", ["dtensor", "megatron"])
def test_the_pair_trains(runs, training, launcher):
    check_pair(training, "vllm", launcher, runs(training, "vllm", launcher))


@pytest.mark.parametrize("training", ["dtensor", "megatron"])
def test_ray_takes_the_steps_of_this_machine(runs, training):
    check_same_run(runs(training, "vllm", "local"), runs(training, "vllm", "ray"))


def test_an_engine_of_two_workers_runs_on_ray(tmp_path):
    """vLLM starts its workers as processes there too, and is given both of its devices."""
    registry = get_registry()
    vllm = registry.resolve("generation_backends", "vllm")
    options = {"tensor_parallel_size": 2, "kv_cache_gib": 0.1}
    generation = GenerationConfig(model_name="scratch:qwen2-tiny", max_sequence_length=64, options=options)
    cluster = ClusterConfig(device="cpu", cpus_per_node=2, colocated=False, roles={"generation": 2})
    launcher = registry.resolve("launchers", "ray").load()()
    launcher.setup(cluster)
    try:
        place = engine_placement(RunConfig(cluster=cluster, generation=generation), vllm.load(), launcher)
        assert (place.num_workers, place.devices_per_worker) == (1, 2)
        engines = start_engine(
            launcher, vllm, config=generation, placement=place, seed=3, run_dir=str(tmp_path), manifest=()
        )
        sampling = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
        asked = GenerationRequest(request_id="r", prompt_ids=[5, 6, 7], sampling=sampling)
        found = asyncio.run(engines.generate(asked))
        digest = engines.fingerprint()
        engines.shutdown()
    finally:
        launcher.shutdown()
    model = load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=3).eval()
    assert digest == fingerprint((name, p.detach()) for name, p in model.named_parameters())
    ids = [5, 6, 7]
    for _ in range(6):
        ids.append(int(forward_logits(model, ids)[-1].argmax()))
    assert found.token_ids == ids[3:]


def test_both_trainers_take_the_same_first_step(runs):
    check_same_first_step(runs("dtensor", "vllm", "local"), runs("megatron", "vllm", "local"))


def test_engine_and_trainer_agree_in_every_step(run):
    assert run.status == "completed"
    assert len(run.history) == 5
    errors = [entry["train/token_mult_prob_error"] for entry in run.history]
    assert max(errors) < 1.0001, errors
    assert all(abs(entry["train/probs_ratio"] - 1) < 1e-4 for entry in run.history)


def test_every_rollout_was_sampled_from_the_weights_of_its_step(run):
    for step in range(1, 6):
        groups = read_groups(run.run_dir / "rollouts" / f"step_{step}.jsonl")
        turns = [turn for g in groups for r in g.rollouts for segment in r.segments for turn in segment]
        versions = {turn.weight_version for turn in turns if turn.sampled}
        assert versions == {step - 1}


def test_logprobs_of_the_first_rollouts_are_those_of_dtensor(run):
    from nemo_rl_plugins_dtensor.backend import DTensorBackend
    from nemo_rl_plugins_dtensor.config import DTensorConfig

    backend = DTensorBackend()
    backend.setup(PolicyConfig(model_name="scratch:qwen2-tiny", options=DTensorConfig()), WorkerContext(seed=7))
    groups = read_groups(run.run_dir / "rollouts" / "step_1.jsonl")
    rollouts = [r for g in groups for r in g.rollouts]
    assert len(rollouts) == 64
    for rollout in rollouts:
        prompt, sampled = rollout.segments[0]
        ids = [*prompt.token_ids, *sampled.token_ids]
        batch = BatchedDataDict([len(ids)])
        batch.set_tokens("input_ids", torch.tensor(ids))
        found = backend.get_logprobs(batch, temperature=0.8)[len(prompt.token_ids) :]
        assert torch.allclose(found, torch.tensor(sampled.logprobs), atol=1e-4)


def test_metrics_of_the_engine_stand_in_the_history(run):
    for entry in run.history:
        assert entry["generation/requests"] == 64
        assert entry["generation/tokens"] > 64
    assert run.history[-1]["generation/refits"] == 1
