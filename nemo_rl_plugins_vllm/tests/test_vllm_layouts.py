"""A model cut over the processes of one engine samples as the whole one, before and after a refit."""

from __future__ import annotations

import pytest
import torch
from vllm_kit import EnginePool, complete, needs_vllm, request

from nemo_rl_core.infra.fingerprint import fingerprint
from nemo_rl_core.testing.conformance.reference import forward_logits

pytestmark = [*needs_vllm, pytest.mark.slow]
PROMPTS = [(20, 31, 42, 53, i) for i in range(8)]


def check_logprobs(engine, model):
    asked = [request(p, seed=i, max_new_tokens=12, ignore_eos=True) for i, p in enumerate(PROMPTS)]
    for prompt, found in zip(PROMPTS, complete(engine, *asked), strict=True):
        logits = forward_logits(model, [*prompt, *found.token_ids])[len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_an_engine_of_two_workers_samples_as_the_whole_model(layout):
    pool = EnginePool()
    try:
        engine = pool.get(**{layout: 2})
        check_logprobs(engine, pool.tiny.model)
        new = pool.tiny.changed_weights()
        engine.update_weights(1, iter(new.items()))
        assert engine.fingerprint() == fingerprint(new.items())
        check_logprobs(engine, pool.tiny.copy(new))
    finally:
        pool.close()
