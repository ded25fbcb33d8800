"""Generation: the `torch_engine` backend against `transformers.generate`, both in this process.

Groups of rollouts of one prompt on a random-initialised model, whose end token comes up by chance, so that
completions have mixed lengths (mean about a third of the maximum). Both sides use the same weights, prompts,
temperature, precision and threads, and take turns. transformers has no queue: it is given the rollouts in
batches of each size in `--peer-batches`, and its best one counts. Ours returns logprobs as well; they are
compared with a full forward.

    python benchmarks/generation.py                      # 10 M parameters, float32, this machine's device
    python benchmarks/generation.py --rollouts 64 --precision bfloat16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.models.source import eos_token_ids
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_plugins_torch_engine.backend import TorchEngine
from nemo_rl_plugins_torch_engine.config import TorchEngineConfig

logger = logging.getLogger("benchmarks.generation")

GROUP = 8
RESULTS = Path(__file__).parent / "results"
_CHECKED = 16


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch:qwen2-10m")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[64, 256], help="multiples of 8; one workload each")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[24, 40], help="shortest and longest prompt")
    parser.add_argument("--max-new-tokens", type=int, default=288)
    parser.add_argument("--rows", type=int, default=64, help="sequences our engine decodes together")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "generation.json")
    return parser.parse_args()


class Workload:
    """Prompts in groups, for both sides."""

    def __init__(self, options: argparse.Namespace, num_rollouts: int, vocab_size: int) -> None:
        low, high = options.prompt_tokens
        generator = torch.Generator().manual_seed(0)
        self.max_new_tokens = options.max_new_tokens
        self.prompts = []
        for _ in range(num_rollouts // GROUP):
            length = int(torch.randint(low, high + 1, (), generator=generator))
            prompt = torch.randint(4, min(vocab_size, 30_000), (length,), generator=generator).tolist()
            self.prompts += [prompt] * GROUP

    def requests(self, repeat: int) -> list[GenerationRequest]:
        """Our requests, with other seeds for each repeat."""
        return [
            GenerationRequest(
                request_id=str(i),
                prompt_ids=prompt,
                sampling=SamplingParams(max_new_tokens=self.max_new_tokens, seed=1_000_003 * repeat + i),
            )
            for i, prompt in enumerate(self.prompts)
        ]


def run_ours(engine: TorchEngine, workload: Workload, repeat: int) -> tuple[int, float, list[Completion]]:
    """Sampled tokens, seconds, completions."""

    async def everything() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(r) for r in workload.requests(repeat)))

    start = time.perf_counter()
    completions = asyncio.run(everything())
    seconds = time.perf_counter() - start
    return sum(len(c.token_ids) for c in completions), seconds, completions


def run_peer(model: Any, workload: Workload, batch: int, eos: int, repeat: int) -> tuple[int, float]:
    """Sampled tokens up to each end token, seconds; left-padded batches, the usual way."""
    torch.manual_seed(repeat)
    device = model.device
    tokens = 0
    start = time.perf_counter()
    for first in range(0, len(workload.prompts), batch):
        prompts = workload.prompts[first : first + batch]
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=workload.max_new_tokens, eos_token_id=eos, pad_token_id=0,
            )  # fmt: skip
        new = out[:, width:]
        ended = new == eos
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
        tokens += int(lengths.sum())
    return tokens, time.perf_counter() - start


def worst_logprob_error(model: Any, workload: Workload, completions: list[Completion]) -> float:
    """Largest difference between our logprobs and a full forward, over some completions."""
    worst = 0.0
    every = max(1, len(completions) // _CHECKED)
    for prompt, completion in list(zip(workload.prompts, completions, strict=True))[::every]:
        ids = torch.tensor([prompt + completion.token_ids], device=model.device)
        with torch.inference_mode():
            rows = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        chosen = rows.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, float((chosen - torch.tensor(completion.logprobs)).abs().max()))
    return worst


def environment(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(
    options: argparse.Namespace, engine: TorchEngine, model: Any, num_rollouts: int, eos: int
) -> dict[str, Any]:
    """Both sides on one workload, taking turns."""
    workload = Workload(options, num_rollouts, model.config.vocab_size)
    batches = sorted({min(b, num_rollouts) for b in options.peer_batches})
    ours: list[float] = []
    peers: dict[int, list[float]] = {b: [] for b in batches}
    warm = Workload(argparse.Namespace(**{**vars(options), "max_new_tokens": 8}), num_rollouts, model.config.vocab_size)
    run_ours(engine, warm, 0)
    run_peer(model, warm, batches[0], eos, 0)
    engine.metrics()
    for repeat in range(options.repeats):
        tokens, seconds, completions = run_ours(engine, workload, repeat)
        ours.append(tokens / seconds)
        for batch in batches:
            peer_tokens, peer_seconds = run_peer(model, workload, batch, eos, repeat)
            peers[batch].append(peer_tokens / peer_seconds)
        logger.info("repeat %d: ours %.0f tokens/s, peer %s", repeat + 1, ours[-1],
                    {b: round(v[-1]) for b, v in peers.items()})  # fmt: skip
    medians = {b: statistics.median(v) for b, v in peers.items()}
    best = max(medians, key=lambda b: medians[b])
    lengths = [len(c.token_ids) for c in completions]
    return {
        "rollouts": num_rollouts,
        "mean_completion_tokens": round(statistics.mean(lengths), 1),
        "max_new_tokens": options.max_new_tokens,
        "ours_tokens_per_s": [round(v, 1) for v in ours],
        "peer_tokens_per_s": {str(b): [round(v, 1) for v in values] for b, values in peers.items()},
        "peer_best_batch": best,
        "ours_median": round(statistics.median(ours), 1),
        "peer_median": round(medians[best], 1),
        "ratio": round(statistics.median(o / p for o, p in zip(ours, peers[best], strict=True)), 3),
        "worst_logprob_error": worst_logprob_error(model, workload, completions),
        "engine_metrics": {k: round(v, 4) for k, v in engine.metrics().items()},
    }


def main() -> None:
    """Measure every workload, print a table, write JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments()
    torch.set_num_threads(options.threads)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    engine = TorchEngine()
    engine.setup(
        GenerationConfig(
            model_name=options.model,
            precision=options.precision,
            options=TorchEngineConfig(max_batch_size=options.rows),
        ),
        WorkerContext(device=device, num_threads=options.threads),
    )
    model = load_model(options.model, dtype=getattr(torch, options.precision)).to(device).eval()
    eos = eos_token_ids(options.model, load_tokenizer(options.model))[0]
    report = {
        "benchmark": "torch_engine against transformers.generate",
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": options.precision,
        "group_size": GROUP,
        "rows": options.rows,
        "prompt_tokens": options.prompt_tokens,
        "environment": environment(options, device),
        "workloads": [measure(options, engine, model, n, eos) for n in options.rollouts],
    }
    engine.shutdown()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)


def show(report: dict[str, Any]) -> None:
    """Log the table."""
    where = report["environment"]
    logger.info("\n%s, %s (%.1f M parameters), %s, %d threads, torch %s, transformers %s", where["device"],
                report["model"], report["parameters"] / 1e6, report["precision"], where["threads"], where["torch"],
                where["transformers"])  # fmt: skip
    logger.info("%9s %6s %16s %24s %7s %14s", "rollouts", "mean", "ours tokens/s", "transformers tokens/s", "ratio",
                "logprob error")  # fmt: skip
    for row in report["workloads"]:
        logger.info(
            "%9d %6.1f %16.0f %15.0f (by %3d) %7.2f %14.1e", row["rollouts"], row["mean_completion_tokens"],
            row["ours_median"], row["peer_median"], row["peer_best_batch"], row["ratio"], row["worst_logprob_error"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
