"""Generation through the `vllm` backend against bare `vllm.LLM`: tokens per second, many requests at a time.

Both sides run the same weights, prompts, sampling and lengths, ask for the logprob of each sampled token, and decode
with as many threads. Each side runs in a process of its own, one after the other, and they take turns; the ratio is of
the medians. The bare engine gets all prompts in one call, which is its fastest way.

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
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BAR = 0.97


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch:qwen2-10m")
    parser.add_argument("--requests", type=int, default=256, help="all in flight at once")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seeded", action="store_true", help="a seed for each request, as in training")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "vllm_overhead.json")
    parser.add_argument("--side", choices=["ours", "bare"], help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(options: argparse.Namespace) -> list[list[int]]:
    """Different prompts of one length."""
    length = options.prompt_tokens
    return [[3 + (i * 31 + j * 7) % 100 for j in range(length)] for i in range(options.requests)]


def ours(options: argparse.Namespace) -> list[float]:
    """Seconds of each repeat through the backend."""
    from nemo_rl_core.config.schema import GenerationConfig
    from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
    from nemo_rl_core.protocols.launcher import WorkerContext
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

    asyncio.run(once())
    taken = [asyncio.run(once()) for _ in range(options.repeats)]
    engine.shutdown()
    return taken


def bare(options: argparse.Namespace) -> list[float]:
    """Seconds of each repeat with `vllm.LLM`, as its documentation uses it."""
    import tempfile

    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from nemo_rl_core.models import load_model

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

    once()
    return [once() for _ in range(options.repeats)]


def run_side(side: str) -> list[float]:
    """Run one side in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side], stdout=subprocess.PIPE, text=True, check=True
    )
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


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
        print(json.dumps(ours(options) if options.side == "ours" else bare(options)), flush=True)
        return
    where = environment()
    tokens = options.requests * options.new_tokens
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for side in ("bare", "ours", "ours", "bare"):
        seconds[side] += run_side(side)
    rates = {side: tokens / statistics.median(taken) for side, taken in seconds.items()}
    result = {
        "benchmark": "vllm backend against vllm.LLM",
        "model": options.model,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "seeded": options.seeded,
        "threads": options.threads,
        "environment": where,
        "tokens_per_s": {side: round(rate, 1) for side, rate in rates.items()},
        "seconds": {side: [round(s, 3) for s in taken] for side, taken in seconds.items()},
        "ratio": round(rates["ours"] / rates["bare"], 3),
        "bar": BAR,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
