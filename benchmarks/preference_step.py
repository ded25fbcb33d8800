"""Training steps against TRL's trainers: SFT (packed), DPO, reward model and RLOO, both sides in one run on the CPU.

Both sides train the same weights on the same rows with the same batch, optimizer and precision (float32); the rows are
random text of log-uniform length. The sides alternate: each round runs one side in a process of its own, then the
other; set-up and the first step of a process are not counted, and the median over the steps of all rounds is reported.
A step is one optimizer step on `BATCH` rows (pairs, for DPO and the reward model). TRL runs twice: as it is shipped
(gradient checkpointing, micro-batches of 8), and tuned by hand: without gradient checkpointing, in the micro-batch that
is fastest for it here. Speed is tokens per second, for with packing TRL's steps do not hold a fixed number of rows;
where both steps hold the same rows this is steps per second.

TRL packs SFT for flash attention alone: on a CPU its packed sequences see each other (it warns). It is measured so as
well (`trl_packed`), but the ratio is to the faster of those that compute the right thing.

    python benchmarks/preference_step.py                      # all cases
    python benchmarks/preference_step.py --task dpo --model qwen2-1m --rounds 1 --steps 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _sides import StepClock, device_name, rate, save_model, spawn

RESULTS = Path(__file__).parent / "results" / "preference_step.json"
TASKS = ("sft", "dpo", "reward_model", "rloo")
MODELS = ("qwen2-1m", "qwen2-10m")
BATCH = 32
MAX_LENGTH = 512
RLOO_PROMPTS, RLOO_GROUP, RLOO_NEW_TOKENS = 8, 8, 128
LEARNING_RATE = 1e-6
TARGET = 1.5


def texts(count: int, *, seed: int, longest: int = 240) -> list[str]:
    """Random texts of 8 to `longest` characters, log-uniform; a character is a token."""
    rng = random.Random(seed)
    lengths = [int(8 * (longest / 8) ** rng.random()) for _ in range(count)]
    return ["".join(rng.choice("0123456789 +-*=abcdefgh") for _ in range(length)) for length in lengths]


def make_rows(task: str, count: int = 512) -> list[dict[str, Any]]:
    """Rows that both sides read."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompts = [said("user", text) for text in texts(count, seed=0, longest=80)]
    if task == "rloo":
        return [{"prompt": prompt} for prompt in prompts]
    answers = [[said("assistant", text) for text in texts(count, seed=seed)] for seed in (1, 2)]
    if task == "sft":
        return [{"messages": [*p, *a]} for p, a in zip(prompts, answers[0], strict=True)]
    return [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(prompts, *answers, strict=True)]


def score(completion_ids: Sequence[int]) -> float:
    """The share of even token ids."""
    return sum(1 for token in completion_ids if token % 2 == 0) / max(len(completion_ids), 1)


# -- one side, in its own process --------------------------------------------------------------------------


def trl_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What every trainer of TRL gets."""
    total = RLOO_PROMPTS * RLOO_GROUP if options.task == "rloo" else BATCH
    return {
        "output_dir": options.scratch,
        "per_device_train_batch_size": options.trl_micro_batch,
        "gradient_accumulation_steps": max(1, total // options.trl_micro_batch),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": options.trl_checkpointing == "yes",
        "max_steps": options.steps + 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": options.seed,
    }


def run_trl(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of TRL's trainer."""
    import transformers
    import trl
    from datasets import Dataset

    from nemo_rl_core.models import load_tokenizer

    transformers.logging.set_verbosity_error()
    clock = StepClock()
    settings, extra = trl_settings(options), {}
    names = {"sft": "SFT", "dpo": "DPO", "reward_model": "Reward", "rloo": "RLOO"}
    name = names[options.task]
    settings["model_init_kwargs"] = {"dtype": "float32"}
    if options.task == "rloo":
        settings |= {"num_generations": RLOO_GROUP, "max_completion_length": RLOO_NEW_TOKENS, "beta": 0.0}
        settings |= {"temperature": 1.0, "epsilon": 0.2}

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            clock.tokens += sum(len(ids) for ids in completion_ids)
            return [score(ids) for ids in completion_ids]

        extra["reward_funcs"] = reward
    else:
        settings["max_length"] = MAX_LENGTH
    if options.task == "sft":
        settings |= {"packing": options.trl_packing == "yes", "assistant_only_loss": False}

    seen = 0.0

    class Ticker(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal seen
            if options.task != "rloo":
                total = float(trainer._total_train_tokens)
                clock.tokens, seen = total - seen, total
            clock.tick()

    trainer = getattr(trl, f"{name}Trainer")(
        model=options.model_folder,
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(make_rows(options.task)),
        # Not the one that transformers takes for this type of model: it would drop the spaces.
        processing_class=load_tokenizer(options.model_folder),
        callbacks=[Ticker()],
        **extra,
    )
    trainer.train()
    return clock.rows[1:]


def run_ours(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of this framework, through its public API."""
    from nemo_rl import Callback, Trainer

    clock = StepClock()

    class Ticker(Callback):
        def on_batch(self, run: Any, batch: Any) -> None:
            clock.tokens += float(batch["loss_mask"].sum() if options.task == "rloo" else batch.num_tokens)

        def on_step_end(self, run: Any, metrics: Any) -> None:
            clock.tick()

    settings: dict[str, Any] = {
        "algorithm": options.task,
        "model": options.model_folder,
        "max_steps": options.steps + 1,
        "learning_rate": LEARNING_RATE,
        "seed": options.seed,
        "run_dir": options.scratch,
        "policy": {
            "max_sequence_length": MAX_LENGTH,
            "max_grad_norm": 1.0,
            "optimizer": {"weight_decay": 0.01, "options": {"fused": True}},
        },
        "cluster": {"device": "cpu"},
        "checkpointing": {"enabled": False, "export_model": False},
        "logging": {"progress": "none"},
    }
    extra: dict[str, Any] = {}
    if options.task == "rloo":
        settings |= {"num_prompts_per_step": RLOO_PROMPTS, "num_generations_per_prompt": RLOO_GROUP}
        settings["generation"] = {"max_new_tokens": RLOO_NEW_TOKENS}
        extra["reward_fn"] = score
    else:
        settings["batch_size"] = BATCH
    if options.task == "sft":
        settings["train_on"] = "all"  # as TRL does without `assistant_only_loss`
    Trainer(settings).fit(make_rows(options.task), callbacks=[Ticker()], **extra)
    return clock.rows[1:]


RUN: dict[str, Callable[[argparse.Namespace], list[dict[str, float]]]] = {
    "trl": run_trl,
    "trl_tuned": run_trl,
    "trl_packed": run_trl,
    "ours": run_ours,
}

# -- the comparison ----------------------------------------------------------------------------------------


def arrangements(task: str, model: Path) -> dict[str, dict[str, Any]]:
    """How TRL is run: as it is shipped, in its fastest micro-batch without checkpointing, and packed."""
    shipped = {"trl_micro_batch": 8, "trl_checkpointing": "yes", "trl_packing": "no"}
    sizes = (16, 64) if task == "rloo" else (4, 8, 32)
    tried = [{**shipped, "trl_micro_batch": size, "trl_checkpointing": "no"} for size in sizes]
    tuned = max(
        tried,
        key=lambda choice: rate(spawn(__file__, "trl_tuned", model_folder=model, task=task, steps=2, seed=1, **choice)),
    )
    found: dict[str, dict[str, Any]] = {"trl": shipped, "trl_tuned": tuned}
    if task == "sft":
        # Packed rows have MAX_LENGTH tokens; so many of them hold about BATCH rows.
        found["trl_packed"] = {**tuned, "trl_micro_batch": 8, "trl_packing": "yes"}
    return {**found, "ours": {}}


def compare(task: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / name
        save_model(name, model, head="scalar" if task == "reward_model" else "lm")
        sides = arrangements(task, model)
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for index in range(options.rounds):
            for side, steps in rows.items():
                steps += spawn(
                    __file__, side, model_folder=model, task=task, steps=options.steps, seed=index, **sides[side]
                )
    result: dict[str, Any] = {"task": task, "model": name, "trl_tuned_arrangement": sides["trl_tuned"]}
    for side, steps in rows.items():
        result[side] = {
            "tokens_per_s": round(rate(steps), 1),
            "seconds_per_step": round(statistics.median(row["seconds"] for row in steps), 4),
            "tokens_per_step": round(statistics.mean(row["tokens"] for row in steps), 1),
            "steps": len(steps),
        }
    fastest = max(result[side]["tokens_per_s"] for side in ("trl", "trl_tuned"))
    result["ratio"] = round(result["ours"]["tokens_per_s"] / fastest, 2)
    result["ratio_as_shipped"] = round(result["ours"]["tokens_per_s"] / result["trl"]["tokens_per_s"], 2)
    return result


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    sides = "".join(f"  {side} {row[side]['tokens_per_s']:8.0f} tok/s" for side in RUN if side in row)
    return f"{row['task']:13} {row['model']:10}{sides}  ratio {row['ratio']:.2f}"


def parse() -> argparse.Namespace:
    """The options of both the comparison and, hidden, of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", dest="tasks", choices=TASKS, help="default: all")
    parser.add_argument("--model", action="append", dest="models", help=f"shape; default {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side in a round")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for hidden in ("--side", "--model-folder", "--scratch", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trl-micro-batch", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--trl-checkpointing", default="yes", help=argparse.SUPPRESS)
    parser.add_argument("--trl-packing", default="no", help=argparse.SUPPRESS)
    return parser.parse_args()


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row, shown as it is made."""
    for name in options.models or MODELS:
        for task in options.tasks or TASKS:
            row = compare(task, name, options)
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
            yield row


def main() -> None:
    """Run one side, or compare."""
    options = parse()
    if options.side:
        (options.task,) = options.tasks
        Path(options.out).write_text(json.dumps(RUN[options.side](options)))
        return
    report = {
        "benchmark": "preference_step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "cpu_count": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "nemo-rl-core")},
        "rows_per_step": BATCH,
        "target_ratio": TARGET,
        "results": list(results(options)),
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
