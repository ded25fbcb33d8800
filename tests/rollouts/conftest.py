"""What the tests of this folder share: a tokenizer, a pool, and an engine made in one line."""

from __future__ import annotations

import asyncio

import pytest

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny")


@pytest.fixture(scope="session")
def shared_pool():
    pool = ProcessPool(2, default_timeout_s=20.0)
    yield pool
    pool.shutdown()


@pytest.fixture
def make_engine(tokenizer, shared_pool):
    def make(script, environment, *, sampling=None, seed=7, max_sequence_length=256, pool=None, **config):
        generation = script if isinstance(script, ScriptedGeneration) else ScriptedGeneration(script, tokenizer)
        return RolloutEngine(
            generation=generation,
            environment=environment,
            chat=ChatFormatter(tokenizer),
            config=RolloutConfig(**config),
            sampling=sampling or SamplingParams(max_new_tokens=32),
            pool=pool or shared_pool,
            seed=seed,
            max_sequence_length=max_sequence_length,
        )

    return make


@pytest.fixture
def run_group():
    def run(engine, task=None, *, group_id=0, group_size=4, weight_version=0, sampling=None):
        return asyncio.run(
            engine.run_group(
                group_id,
                f"task-{group_id}",
                task or {"prompt": "2+2", "answer": "4"},
                group_size=group_size,
                weight_version=weight_version,
                sampling=sampling,
            )
        )

    return run
