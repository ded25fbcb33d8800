"""What the engine's tests share: a model whose heads vLLM's CPU attention takes, and engines that outlive a test.

A start of vLLM takes 10 to 15 seconds, so tests share engines and put the first weights back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_core.testing.conformance.cases.reference import TINY_SHAPE, TinyModel, forward_logits, tiny_model
from nemo_rl_plugins_vllm.backend import VLLMEngine
from nemo_rl_plugins_vllm.config import VLLMConfig
from nemo_rl_plugins_vllm.installed import installed_version

SHAPE = {**TINY_SHAPE, "hidden_size": 64, "head_dim": 32}
LONG = 1000
"""Context of the engines, except of those that are to have a short one."""

needs_vllm = [
    pytest.mark.skipif(installed_version() is None, reason="vLLM is not installed"),
    pytest.mark.xdist_group("vllm"),
    pytest.mark.timeout(600),
]
"""`pytestmark` of a module that starts engines."""


class EnginePool:
    """Engines by what they were made with; each has the checkpoint's weights, version 0, when it is handed out."""

    def __init__(self, shape: Mapping[str, Any] = SHAPE) -> None:
        self._shape = shape
        self._engines: dict[tuple[Any, ...], VLLMEngine] = {}

    def get(self, *, max_sequence_length: int = LONG, seed: int = 0, **options: Any) -> VLLMEngine:
        key = (max_sequence_length, seed, *sorted(options.items()))
        engine = self._engines.get(key)
        if engine is None or engine._thread._stopped:
            engine = self._engines[key] = VLLMEngine()
            config = GenerationConfig(
                model_name=self.tiny.folder,
                options=VLLMConfig(kv_cache_gib=0.25, **options),
                precision="float32",
                max_sequence_length=max_sequence_length,
            )
            engine.setup(config, WorkerContext(role="generation", seed=seed, num_threads=1))
        else:
            engine.resume()
            engine.wake()
            engine.update_weights(0, iter(self.tiny.weights().items()))
            engine.metrics()
        return engine

    @property
    def tiny(self) -> TinyModel:
        return tiny_model(self._shape)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.shutdown()


def request(prompt, *, name="r", order=(), **sampling) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=prompt, order=order, sampling=SamplingParams(**sampling))


def generate(engine, *requests, timeout_s=120.0):
    """All completions of `requests`, asked for at once; an error is returned in its place."""

    async def run():
        calls = asyncio.gather(*(engine.generate(r) for r in requests), return_exceptions=True)
        return await asyncio.wait_for(calls, timeout_s)

    return asyncio.run(run())


def complete(engine, *requests):
    """As `generate`, but an error is raised."""
    results = generate(engine, *requests)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def reference_logprobs(model, prompt, token_ids):
    """Logprobs of a continuation by a plain forward pass."""
    logprobs = forward_logits(model, [*prompt, *token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def largest_difference(model, prompt, completion):
    """Between the logprobs of a completion and those of a plain forward pass."""
    wanted = reference_logprobs(model, prompt, completion.token_ids)
    return float((torch.tensor(completion.logprobs) - wanted).abs().max())
