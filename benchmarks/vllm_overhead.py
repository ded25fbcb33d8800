"""Generation through the `vllm` backend against bare `vllm.LLM`: tokens per second, many requests at a time.

All sides run the same weights, prompts, sampling and lengths, ask for the logprob of each sampled token, and decode
with as many threads. The bare engine gets all prompts in one call, its fastest way, and comes in three arrangements:

- `bare`: the engine in one process of its own, as ours has it and as `LLM` has it on a GPU;
- `bare_default`: as `LLM` starts it here; on a CPU that is two processes, one for the engine and one for its worker;
- `bare_in_process`: the engine in the process that asks (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), where no other thread of
  that process can run beside it.

Each side lives in a process of its own, and they take turns, round by round, so that what else the machine does meets
all of them. Ratios are medians over the rounds; the one with the bar is against `bare`.

    python benchmarks/vllm_overhead.py                        # 10 M parameters, 256 requests at a time
    python benchmarks/vllm_overhead.py --requests 64 --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BAR = 0.97
WARM_UP = 1
"""Rounds that do not count."""
SIDES = ("ours", "bare", "bare_default", "bare_in_process")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch:qwen2-10m")
    parser.add_argument("--requests", type=int, default=256, help="all in flight at once")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seeded", action="store_true", help="a seed for each request, as in training")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "vllm_overhead.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(options: argparse.Namespace) -> list[list[int]]:
    """Different prompts of one length."""
    length = options.prompt_tokens
    return [[3 + (i * 31 + j * 7) % 100 for j in range(length)] for i in range(options.requests)]


def ours(options: argparse.Namespace) -> tuple[Callable[[], float], Callable[[], None]]:
    """Through the backend: what generates once and gives the seconds, and what ends the engine."""
    from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig
    from nemo_rl_plugins_vllm.backend import VLLMEngine
    from nemo_rl_plugins_vllm.config import VLLMConfig

    engine = VLLMEngine()
    config = GenerationConfig(
        model_name=options.model, options=VLLMConfig(max_num_seqs=options.requests, num_threads=options.threads)
    )
    engine.setup(config, WorkerContext())

    async def once() -> float:
        requests = [
            GenerationRequest(
                request_id=str(i),
                prompt_ids=prompt,
                sampling=SamplingParams(
                    max_new_tokens=options.new_tokens, ignore_eos=True, seed=i if options.seeded else None
                ),
            )
            for i, prompt in enumerate(prompts(options))
        ]
        start = time.perf_counter()
        found = await asyncio.gather(*(engine.generate(request) for request in requests))
        seconds = time.perf_counter() - start
        assert all(len(c.token_ids) == len(c.logprobs) == options.new_tokens for c in found)
        return seconds

    return lambda: asyncio.run(once()), engine.shutdown


def bare(options: argparse.Namespace) -> tuple[Callable[[], float], Callable[[], None]]:
    """With `vllm.LLM`, as its documentation uses it."""
    import tempfile

    import torch

    if options.side != "bare_default":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from nemo_rl_core.models import load_model

    if options.side == "bare":
        _engine_in_one_process()

    with tempfile.TemporaryDirectory() as folder:
        load_model(options.model, dtype=torch.float32).save_pretrained(folder)
        gpu = not current_platform.is_cpu()
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=options.requests,
            enforce_eager=not gpu,
            logprobs_mode="processed_logprobs",
            **({} if gpu else {"kv_cache_memory_bytes": 1 << 30}),
        )
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(options)]
    sampling = [
        SamplingParams(
            max_tokens=options.new_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            seed=i if options.seeded else None,
        )
        for i in range(options.requests)
    ]

    def once() -> float:
        start = time.perf_counter()
        found = llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(f.outputs[0].token_ids) == options.new_tokens for f in found)
        return seconds

    return once, lambda: llm.llm_engine.engine_core.shutdown()


def _engine_in_one_process() -> None:
    """The engine apart but its worker in it, which on a CPU no setting of `LLM` gives."""
    from vllm.v1.engine.llm_engine import LLMEngine

    make: Any = LLMEngine.from_engine_args
    LLMEngine.from_engine_args = partial(make, enable_multiprocessing=True)


class Side:
    """One side in a process of its own, which takes a turn when it is told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, what: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return line.split()[1]
        raise SystemExit(f"The side {self.name!r} has ended; what it printed above has the cause.")

    def turn(self, *, counted: bool = True) -> None:
        """Generate once."""
        found = float(self._say("go"))
        if counted:
            self.seconds.append(found)

    def end(self) -> None:
        """End it and its engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def take_turns(options: argparse.Namespace) -> None:
    """What a side's process does: set up, and generate once for each line that it is sent."""
    once, end = (ours if options.side == "ours" else bare)(options)
    for _ in sys.stdin:
        print("seconds", once(), flush=True)
    end()


def environment() -> dict[str, Any]:
    """What the numbers were taken on."""
    from importlib.metadata import version

    from nemo_rl_plugins_vllm.installed import installed_version

    return {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": " ".join(installed_version() or ("none",)),
    }


def main() -> None:
    """Measure, print and write."""
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # both sides get the same cores
    if options.side:
        take_turns(options)
        return
    where = environment()
    sides = [Side(name) for name in SIDES]
    for number in range(options.rounds + WARM_UP):
        order = sides if number % 2 else sides[::-1]
        for side in order:
            side.turn(counted=number >= WARM_UP)
    for side in sides:
        side.end()
    tokens = options.requests * options.new_tokens
    seconds = {side.name: side.seconds for side in sides}
    ratios = {
        name: [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[name], strict=True)]
        for name in SIDES
        if name != "ours"
    }
    medians = {name: round(statistics.median(found), 3) for name, found in ratios.items()}
    result = {
        "benchmark": "vllm backend against vllm.LLM",
        "model": options.model,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "seeded": options.seeded,
        "threads": options.threads,
        "environment": where,
        "tokens_per_s": {name: round(tokens / statistics.median(taken), 1) for name, taken in seconds.items()},
        "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
        "ratios": {name: [round(r, 3) for r in found] for name, found in ratios.items()},
        "medians": medians,
        "ratio": medians["bare"],
        "bar": BAR,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
