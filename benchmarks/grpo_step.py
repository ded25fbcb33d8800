"""GRPO steps against TRL's `GRPOTrainer`: trained tokens per second, both sides in one run.

Both train the same weights on the same prompts with the same group size, sampling, optimizer and precision; the
reward is a cheap function of the token ids. The model is random, so its end-of-sequence probability (about 1 in 104)
makes completions of mixed length with a mean of about a third of the maximum. The sides alternate: each round runs
one side in a process of its own, then the other; set-up and the first step of a process are not counted, and the
median over the steps of all rounds is reported. TRL runs twice: as it is shipped (gradient checkpointing,
micro-batches of 8), and tuned by hand: without gradient checkpointing, in the arrangement of micro-batches (and, in
bfloat16, of parameters) that is fastest for it here.

    python benchmarks/grpo_step.py                      # all cases, about half an hour on two cores
    python benchmarks/grpo_step.py --model qwen2-1m --rounds 1 --steps 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _sides import StepClock, device_name, rate, save_model, spawn

RESULTS = Path(__file__).parent / "results" / "grpo_step.json"
NUM_PROMPTS = 8
GROUP_SIZE = 8
MAX_NEW_TOKENS = 256
LEARNING_RATE = 1e-6
MODELS = ("qwen2-1m", "qwen2-10m")
TARGET = 2.5


def make_prompts(kind: str, *, count: int = 512, seed: int = 0) -> list[str]:
    """`equal`: all of one length; `mixed`: 4 to 160 characters, log-uniform."""
    rng = random.Random(seed)
    if kind == "equal":
        return [f"{rng.randrange(100, 999)} + {rng.randrange(100, 999)} = " for _ in range(count)]
    lengths = [int(4 * 40 ** rng.random()) for _ in range(count)]
    return ["".join(rng.choice("0123456789 +-*=abcdefgh") for _ in range(length)) for length in lengths]


def score(completion_ids: Sequence[int]) -> float:
    """The share of even token ids: cheap, and different for the members of a group."""
    return sum(1 for token in completion_ids if token % 2 == 0) / max(len(completion_ids), 1)


# -- one side, in its own process --------------------------------------------------------------------------


def run_trl(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of TRL's trainer."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    clock = StepClock()
    total = NUM_PROMPTS * GROUP_SIZE
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    pure = options.precision == "bfloat16" and options.trl_bf16 == "pure"
    config = GRPOConfig(
        output_dir=options.scratch,
        per_device_train_batch_size=options.trl_micro_batch,
        gradient_accumulation_steps=total // options.trl_micro_batch,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=options.trl_checkpointing == "yes",
        max_steps=options.steps + 1,
        bf16=options.precision == "bfloat16" and not pure,
        use_cpu=not on_gpu,
        model_init_kwargs={"dtype": "bfloat16" if pure else "float32"},
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=options.seed,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.count(completion_ids)
        return [score(ids) for ids in completion_ids]

    class Ticker(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in make_prompts(options.prompts)]
    trainer = GRPOTrainer(
        model=options.model_folder,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Ticker()],
    )
    trainer.train()
    return clock.rows[1:]


def run_ours(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of this framework, through its public API."""
    from nemo_rl import Callback, GRPOTrainer

    clock = StepClock()

    class Ticker(Callback):
        def on_rollouts(self, run: Any, groups: Any) -> None:
            sampled = (rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
            clock.tokens += sum(sampled)

        def on_step_end(self, run: Any, metrics: Any) -> None:
            clock.tick()

    trainer = GRPOTrainer(
        {
            "model": options.model_folder,
            "num_prompts_per_step": NUM_PROMPTS,
            "num_generations_per_prompt": GROUP_SIZE,
            "max_steps": options.steps + 1,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
            "run_dir": options.scratch,
            "policy": {
                "precision": options.precision,
                "max_grad_norm": 1.0,
                "optimizer": {"weight_decay": 0.01, "options": {"fused": True}},
            },
            "generation": {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0},
            "cluster": {"device": options.device},
            "checkpointing": {"enabled": False, "export_model": False},
            "logging": {"progress": "none"},
        }
    )
    trainer.fit(
        dataset=[{"prompt": text} for text in make_prompts(options.prompts)], reward_fn=score, callbacks=[Ticker()]
    )
    return clock.rows[1:]


SIDES = {"trl": run_trl, "trl_tuned": run_trl, "ours": run_ours}

# -- the comparison ----------------------------------------------------------------------------------------


SHIPPED = {"trl_micro_batch": 8, "trl_bf16": "autocast", "trl_checkpointing": "yes"}


def fastest_trl(model: Path, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The arrangement in which TRL is fastest on this machine: one counted step of each."""
    arrangements = [{"trl_micro_batch": size, "trl_bf16": "autocast"} for size in (16, 64)]
    if precision == "bfloat16":
        arrangements += [{"trl_micro_batch": size, "trl_bf16": "pure"} for size in (16, 64)]
    case = {"precision": precision, "prompts": "equal", "steps": 1, "seed": 1}
    return max(
        arrangements,
        key=lambda choice: rate(
            spawn(__file__, "trl_tuned", model_folder=model, device=options.device, **case, **choice)
        ),
    )


def compare(name: str, model: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case of one model."""
    for precision in options.precision_cases:
        tuned = fastest_trl(model, options, precision) if "trl_tuned" in options.sides else {}
        arrangements = {"trl": SHIPPED, "trl_tuned": tuned, "ours": {}}
        for prompts in options.prompt_cases:
            rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES if side in options.sides}
            for round_index in range(options.rounds):
                case = {"precision": precision, "prompts": prompts, "steps": options.steps, "seed": round_index}
                for side, steps in rows.items():
                    steps += spawn(
                        __file__, side, model_folder=model, device=options.device, **case, **arrangements[side]
                    )
            yield summary(name, precision, prompts, tuned, rows)


def summary(
    name: str, precision: str, prompts: str, tuned: dict[str, Any], rows: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """One row of the table."""
    result: dict[str, Any] = {"model": name, "precision": precision, "prompts": prompts, "trl_tuned_arrangement": tuned}
    for side, steps in rows.items():
        result[side] = {
            "tokens_per_s": round(rate(steps), 1),
            "seconds_per_step": round(statistics.median(row["seconds"] for row in steps), 3),
            "mean_completion": round(statistics.mean(r["tokens"] for r in steps) / (NUM_PROMPTS * GROUP_SIZE), 1),
            "steps": len(steps),
        }
    for side in ("trl", "trl_tuned"):
        if {side, "ours"} <= rows.keys():
            result[f"ratio_to_{side}"] = round(result["ours"]["tokens_per_s"] / result[side]["tokens_per_s"], 2)
    return result


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    sides = "".join(
        f"  {side} {row[side]['tokens_per_s']:9.0f} tok/s {row[side]['seconds_per_step']:8.2f} s/step"
        for side in SIDES
        if side in row
    )
    ratios = "".join(f"  {name} {row[name]:.2f}" for name in row if name.startswith("ratio"))
    return f"{row['model']:10} {row['precision']:9} {row['prompts']:6}{sides}{ratios}"


def parse() -> argparse.Namespace:
    """The options of both the comparison and, hidden, of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", dest="models", help=f"shape; default {', '.join(MODELS)}")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--precision-cases", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt-cases", nargs="+", default=["equal", "mixed"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each side in a round")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    for hidden in ("--side", "--model-folder", "--scratch", "--out", "--precision", "--prompts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trl-micro-batch", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--trl-bf16", default="autocast", help=argparse.SUPPRESS)
    parser.add_argument("--trl-checkpointing", default="no", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one side, or compare."""
    options = parse()
    if options.side:
        Path(options.out).write_text(json.dumps(SIDES[options.side](options)))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models or MODELS:
            model = Path(folder) / name
            save_model(name, model)
            for row in compare(name, model, options):
                results.append(row)
                sys.stdout.write(line(row) + "\n")
                sys.stdout.flush()
    report = {
        "benchmark": "grpo_step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(options.device),
        "cpu_count": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "nemo-rl-core")},
        "group_size": GROUP_SIZE,
        "completions_per_step": NUM_PROMPTS * GROUP_SIZE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "target_ratio_float32": TARGET,
        "results": results,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
