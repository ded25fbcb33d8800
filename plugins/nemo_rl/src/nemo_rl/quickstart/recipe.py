"""Two trainings of the quickstart, through the public API.

A small model with random weights is fine-tuned on sloppy demonstrations of addition, in which three of four answers
are one too high. It learns to add, and to be wrong about three times out of four. GRPO then teaches it to be right,
with nothing but the reward.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rl.quickstart.report import write_report
from nemo_rl.quickstart.result import QuickstartResult
from nemo_rl_core.records.run_state import RunResult, Sample
from nemo_rl_core.registry import get_registry
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_env_reasoning_gym.dataset import ReasoningGymData, ReasoningGymSource
from nemo_rl_plugins_grpo.trainer import GRPOTrainer
from nemo_rl_plugins_sft.trainer import SFTTrainer

__all__ = ["arithmetic_data", "demonstrations", "run_quickstart"]

MODEL = "scratch:qwen2-500k"
NUM_ROWS = 64_000
"""Number of demonstrations, and of tasks for GRPO; reasoning-gym uses one seed for each row."""
HELD_OUT_SEED = 77
NUM_HELD_OUT = 256
EXACT_SHARE = 0.25
"""Fraction of the demonstrations whose answer is correct."""


def arithmetic_data(*, seed: int, size: int) -> dict[str, Any]:
    """Configure reasoning-gym arithmetic, with questions shortened to `12 + 34 =` by a template."""
    return {
        "source": "reasoning_gym",
        "options": {
            "task": "basic_arithmetic",
            "size": size,
            "seed": seed,
            "options": {
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 1,
                "max_digits": 2,
                "operators": ["+"],
                "allow_parentheses": False,
            },
        },
        "prompt_template": "{metadata[expression]} =",
    }


def run_quickstart(
    run_dir: Path,
    *,
    seed: int = 0,
    generation_backend: str = "torch_engine",
    progress: str = "auto",
    announce: Callable[[str], None] = lambda text: None,
) -> QuickstartResult:
    """Run both trainings and the evaluations, and write the report.

    Args:
        run_dir: Folder for all output; a stage that is finished in it is not repeated.
        seed: Seed of the model, the data order and the sampling.
        generation_backend: Backend that samples in GRPO and in the evaluations.
        progress: Form of the runs' progress (`logging.progress`).
        announce: Function that is called with a line of text at the start of each stage.
    """
    started = time.perf_counter()
    get_registry().resolve("generation_backends", generation_backend)  # a name that nobody has is refused at once
    common = {"seed": seed, "logging": {"progress": progress}}
    sampling = {"max_new_tokens": 6, "backend": generation_backend}
    announce(f"1/4  Warm start: supervised fine-tuning of a {MODEL} model made from scratch")
    sft = _warm_start(run_dir / "sft", common, seed)
    if sft.model_path is None:
        raise KeyboardInterrupt
    announce("2/4  Accuracy on held-out tasks after the warm start")
    before, greedy_before, samples_before = _accuracy(sft.model_path, common, sampling)
    announce(f"     sampled {before:.3f}, greedy {greedy_before:.3f}")
    announce("3/4  GRPO: the same tasks, nothing but the reward")
    grpo = _grpo(run_dir / "grpo", common, sampling, sft.model_path, seed)
    if grpo.model_path is None:
        raise KeyboardInterrupt
    announce("4/4  Accuracy on held-out tasks after GRPO")
    after, greedy_after, samples_after = _accuracy(grpo.model_path, common, sampling)
    result = QuickstartResult(
        seed=seed,
        generation_backend=generation_backend,
        sft=sft,
        grpo=grpo,
        accuracy_before=before,
        accuracy_after=after,
        greedy_before=greedy_before,
        greedy_after=greedy_after,
        samples_before=samples_before,
        samples_after=samples_after,
        seconds=time.perf_counter() - started,
        report=run_dir / "report.html",
    )
    write_report(result)
    return result


def demonstrations(*, seed: int, size: int) -> list[dict[str, str]]:
    """Make rows with `prompt` and `response`; a response is right with probability `EXACT_SHARE`, else one too high."""
    source = arithmetic_data(seed=seed, size=size)
    rows = ReasoningGymSource(ReasoningGymData(**source["options"])).load()
    rng = random.Random(seed)
    made = []
    for row in rows:
        slip = 0 if rng.random() < EXACT_SHARE else 1
        made.append({"prompt": source["prompt_template"].format(**row), "response": str(int(row["answer"]) + slip)})
    return made


def _first_row(seed: int, stage: int) -> int:
    """Seeds of the rows: those of the stages, of other runs and the held-out ones do not meet."""
    return (2 * seed + stage) * 1_000_000


def _policy(warmup_steps: int, schedule: str) -> dict[str, Any]:
    return {
        "optimizer": {"weight_decay": 0.0, "betas": [0.9, 0.95]},
        "scheduler": {"name": schedule, "warmup_steps": warmup_steps, "min_lr_ratio": 0.1},
        "max_sequence_length": 32,
    }


def _warm_start(run_dir: Path, common: dict[str, Any], seed: int) -> RunResult:
    trainer = SFTTrainer(
        {
            "model": MODEL,
            "learning_rate": 2e-3,
            "batch_size": 128,
            "max_steps": 500,
            "run_dir": str(run_dir),
            "policy": _policy(50, "linear"),
            **common,
        }
    )
    return trainer.fit(demonstrations(seed=_first_row(seed, 1), size=NUM_ROWS))


def _grpo(run_dir: Path, common: dict[str, Any], sampling: dict[str, Any], model: Path, seed: int) -> RunResult:
    trainer = GRPOTrainer(
        {
            "model": str(model),
            "learning_rate": 1e-3,
            "num_prompts_per_step": 128,
            "num_generations_per_prompt": 8,
            "max_steps": 160,
            "run_dir": str(run_dir),
            "policy": _policy(5, "linear"),
            "generation": sampling,
            "data": {"train": arithmetic_data(seed=_first_row(seed, 2), size=NUM_ROWS)},
            "environment": "reasoning_gym",
            "rollouts": {"record": False},
            **common,
        }
    )
    return trainer.fit()


def _accuracy(model: Path, common: dict[str, Any], sampling: dict[str, Any]) -> tuple[float, float, list[Sample]]:
    """Held-out accuracy sampled as in training, greedily, and some answers."""

    def evaluate(temperature: float) -> Any:
        trainer = Trainer(
            {
                "algorithm": "grpo",
                "model": str(model),
                "policy": {"max_sequence_length": 32},
                "generation": sampling,
                "data": {"validation": arithmetic_data(seed=HELD_OUT_SEED, size=NUM_HELD_OUT)},
                "validation": {"max_samples": NUM_HELD_OUT, "temperature": temperature},
                "environment": "reasoning_gym",
                **common,
            }
        )
        return trainer.evaluate()

    sampled, greedy = evaluate(1.0), evaluate(0.0)
    return sampled.metrics["env/solved"], greedy.metrics["env/solved"], sampled.samples
