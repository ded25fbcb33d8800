"""A model cut over the processes of one engine samples as the whole one, before and after a refit."""

from __future__ import annotations

import pytest
import torch
from vllm_kit import EnginePool, complete, needs_vllm, request

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.testing.conformance.cases.reference import forward_logits

pytestmark = [*needs_vllm, pytest.mark.slow]
PROMPTS = [(20, 31, 42, 53, i) for i in range(8)]


def check_logprobs(engine, model):
    asked = [request(p, seed=i, max_new_tokens=12, ignore_eos=True) for i, p in enumerate(PROMPTS)]
    for prompt, found in zip(PROMPTS, complete(engine, *asked), strict=True):
        logits = forward_logits(model, [*prompt, *found.token_ids])[len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=0, atol=1e-4)


def spoil(engine):
    """The second copy of the engine forgets what the update brought it."""
    core = engine._thread._llm.engine_core
    work = core._call_utility_async(
        "collective_rpc", "start_weight_update", None, (), None, engine=core.core_engines[1]
    )
    engine._thread.call(work, what="Spoiling", timeout_s=60)


@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_an_engine_of_two_workers_samples_as_the_whole_model(layout):
    pool = EnginePool()
    try:
        engine = pool.get(**{layout: 2})
        check_logprobs(engine, pool.tiny.model)
        new = pool.tiny.changed_weights()
        engine.update_weights(1, iter(new.items()))
        assert engine.fingerprint() == fingerprint(new.items())
        check_logprobs(engine, pool.tiny.copy(new))
        engine.sleep()
        engine.wake()
        check_logprobs(engine, pool.tiny.copy(new))
        if layout == "data_parallel_size":
            spoil(engine)
            with pytest.raises(GenerationError, match="hold different weights"):
                engine.fingerprint()
    finally:
        pool.close()
