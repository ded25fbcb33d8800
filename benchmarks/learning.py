"""Each algorithm improves its own measure: curves of three seeds, by the tasks of `examples/algorithms` on a CPU.

Policy-gradient algorithms: mean reward (the share of vowels). PPO: reward, and the critic's explained variance. The DPO
family: held-out preference accuracy. Reward model: held-out accuracy. SFT: loss. Distillation: divergence from the
teacher. A curve is the measure at the start, at three points between, and at the end, each a mean over neighbours.

    python benchmarks/learning.py                       # all; minutes
    python benchmarks/learning.py --only rloo dpo/ipo
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _sides import device_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "learning.json"
SEEDS = (0, 1, 2)
QUIET: dict[str, Any] = {
    "logging": {"progress": "none"},
    "checkpointing": {"enabled": False, "export_model": False},
    "cluster": {"device": "cpu"},
}
LOSSES = ("dpo", "cdpo", "robust_dpo", "ipo", "dpo_hinge", "dpo_norm", "rpo", "kto", "orpo", "simpo")
Curves = dict[str, list[float]]


def example(name: str) -> Mapping[str, Any]:
    """The names of an example's file."""
    return runpy.run_path(str(ROOT / "examples" / "algorithms" / f"{name}.py"))


def train(settings: Mapping[str, Any], *data: Any, **more: Any) -> list[dict[str, float]]:
    """The history of a run in a folder of its own."""
    from nemo_rl_core.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        return Trainer({**QUIET, **settings, "run_dir": folder}).fit(*data, **more).history


def curve(history: Sequence[Mapping[str, float]], name: str, *, width: int = 3) -> list[float]:
    """Five points of a measure, means over `width` steps."""
    values = [step[name] for step in history if name in step]
    width = min(width, max(1, len(values) // 5))
    starts = [round(i * (len(values) - width) / 4) for i in range(5)]
    return [round(statistics.mean(values[s : s + width]), 4) for s in starts]


def policy_gradient(name: str, seed: int) -> Curves:
    """One of the GRPO family."""
    given = example("policy_gradient")
    settings = {**given["COMMON"], **given["OWN"][name], "algorithm": name, "seed": seed}
    return {"reward": curve(train(settings, [{"prompt": f"{n}:"} for n in range(64)], given["vowels"]), "reward/mean")}


def ppo(_: str, seed: int) -> Curves:
    """Half of the prompts pay nothing, which the critic has to learn."""
    settings = {
        "algorithm": "ppo",
        "model": "scratch:qwen2-tiny",
        "seed": seed,
        "learning_rate": 2e-3,
        "critic_learning_rate": 1e-2,
        "critic_warmup_steps": 3,
        "num_prompts_per_step": 16,
        "num_generations_per_prompt": 4,
        "updates_per_step": 2,
        "epochs_per_step": 2,
        "critic_epochs_per_step": 4,
        "max_steps": 30,
        "policy": {"max_sequence_length": 24},
        "generation": {"max_new_tokens": 8},
        "advantage": {"name": "gae", "options": {"critic_lambda": 1.0}},
    }
    rows = [{"prompt": f"{n % 2}:", "worth": n % 2} for n in range(64)]
    history = train(settings, rows, example("ppo")["vowels"])
    explained = curve(history, "train/critic/explained_variance")
    return {"reward": curve(history, "reward/mean"), "explained_variance": explained}


def on_pairs(name: str, seed: int) -> Curves:
    """A loss of the DPO family (`dpo/<loss>`), or the reward model, on pairs that it has not seen."""
    algorithm, _, loss = name.partition("/")
    pairs = example(algorithm)["pairs"]
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "model": "scratch:qwen2-tiny",
        "seed": seed,
        "learning_rate": 3e-3,
        "batch_size": 16,
        "max_steps": 40,
        "policy": {"max_sequence_length": 32},
        "validation": {"every": 10, "at_start": True},
        **({"loss": loss} if loss else {}),
    }
    history = train(settings, pairs(400, seed=seed), validation_dataset=pairs(64, seed=1000 + seed))
    measure = "accuracy" if algorithm == "reward_model" else "rewards/accuracies"
    return {"held_out_accuracy": curve(history, f"validation/{measure}", width=1)}


def sft(_: str, seed: int) -> Curves:
    """Sums of two digits."""
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(10) for b in range(10)]
    return {"loss": curve(train({**example("sft")["SETTINGS"], "validation": {}, "seed": seed}, rows), "train/loss")}


def distillation(name: str, seed: int) -> Curves:
    """A teacher that learnt sums, and a student that has only the teacher."""
    from nemo_rl_core.training.trainer import Trainer

    small = example("distillation")["SMALL"]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(5) for b in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        taught = {**small, "algorithm": "sft", "batch_size": 25, "max_steps": 60, "run_dir": folder, "seed": 9}
        logging = {"logging": QUIET["logging"], "cluster": QUIET["cluster"]}
        teacher = Trainer({**taught, **logging}).fit(rows).model_path
        settings = {**small, "algorithm": name, "teacher": {"model_name": str(teacher)}, "max_steps": 40, "seed": seed}
        if name == "distillation":
            settings |= {"num_prompts_per_step": 25, "generation": {"max_new_tokens": 4}}
        else:
            settings |= {"batch_size": 25}
        return {"divergence": curve(train(settings, rows), "train/divergence")}


ALGORITHMS: dict[str, Callable[[str, int], Curves]] = {
    **dict.fromkeys(("grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_pp"), policy_gradient),
    "ppo": ppo,
    "sft": sft,
    **dict.fromkeys([f"dpo/{loss}" for loss in LOSSES] + ["reward_model"], on_pairs),
    **dict.fromkeys(("distillation", "off_policy_distillation"), distillation),
}


def main() -> None:
    """Train, show and write."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[list[float]]]] = {}
    if options.results.is_file() and options.only != list(ALGORITHMS):
        found = json.loads(options.results.read_text())["curves"]
    for name in options.only:
        start = time.process_time()
        seeds = [ALGORITHMS[name](name, seed) for seed in SEEDS]
        found[name] = {measure: [curves[measure] for curves in seeds] for measure in seeds[0]}
        for measure, curves in found[name].items():
            sys.stdout.write(f"{name:24} {measure:20} {'   '.join(str(c) for c in curves)}\n")
        sys.stdout.write(f"{'':24} {(time.process_time() - start) / len(SEEDS):.1f} s of processor time a seed\n")
        sys.stdout.flush()
        report = {"benchmark": "learning", "device": device_name(), "seeds": SEEDS, "curves": found}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
