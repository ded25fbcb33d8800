"""Processes of vLLM that are killed while it samples."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from vllm_kit import LONG, needs_vllm, request

from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.schema import ClusterConfig, GenerationConfig
from nemo_rl_plugins_vllm.backend import VLLMEngine
from nemo_rl_plugins_vllm.config import VLLMConfig

pytestmark = [*needs_vllm, pytest.mark.slow]
ASKED = [
    request((20, 31, 42, i), name=str(i), order=(i, 0, 0), seed=i, max_new_tokens=400, ignore_eos=True)
    for i in range(4)
]


def children(link):
    import psutil  # vLLM brings it

    return psutil.Process(link.served.pid).children(recursive=True)


def test_an_engine_whose_process_is_killed_is_started_again_and_leaves_nothing_behind(pool, tmp_path):
    import psutil

    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    options = VLLMConfig(kv_cache_gib=0.25)
    config = GenerationConfig(
        model_name=pool.tiny.folder, options=options, precision="float32", max_sequence_length=LONG
    )
    spec = WorkerSpec(
        role="generation",
        factory=EngineHost,
        config=HostConfig(engine=VLLMEngine, generation=config),
        own_process=True,
        run_dir=str(tmp_path),
    )
    made = EngineWorkers.start(lambda index: launcher.launch(spec), num_workers=1, timeout_s=300, max_restarts=1)
    try:
        (core,) = [child for child in children(made.links[0]) if "EngineCore" in "".join(child.cmdline())]

        async def work():
            tasks = [asyncio.create_task(made.generate(asked)) for asked in ASKED]
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in tasks)
            core.kill()
            return await asyncio.gather(*tasks)

        found = asyncio.run(work())
        assert [len(completion.token_ids) for completion in found] == [400] * 4 and made.num_restarts == 1

        (link,) = made.links
        left = children(link)
        assert left
        os.kill(link.served.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="ended by signal 9"):
            made.metrics()
        assert psutil.wait_procs(left, timeout=30)[1] == []
    finally:
        made.shutdown()
