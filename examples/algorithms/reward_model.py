"""A reward model, and GRPO on its scores, on a CPU in under a minute.

The preference is for more digits. The reward model learns it from pairs; the policy, which has seen no pair, learns
it from the scores.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from nemo_rl_core.training.trainer import Trainer

SMALL: dict[str, Any] = {"model": "scratch:qwen2-tiny", "policy": {"max_sequence_length": 32}}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Two answers of random digits, of which the longer one is chosen."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        short, long = sorted(rng.sample(range(8), 2))
        chosen, rejected = ("".join(rng.choices("0123456789", k=length)) for length in (long, short))
        rows.append({"prompt": f"{rng.randrange(1000)}?", "chosen": chosen, "rejected": rejected})
    return rows


def main(folder: Path) -> None:
    """Train both, and tell how far each came."""
    sizes = {"batch_size": 16, "learning_rate": 3e-3, "max_steps": 40}
    scorer = Trainer({"algorithm": "reward_model", **SMALL, **sizes, "run_dir": str(folder / "reward_model")})
    trained = scorer.fit(pairs(400, seed=0), validation_dataset=pairs(64, seed=1))
    print(
        f"accuracy {trained.history[0]['train/accuracy']:.2f} at first, {trained.metrics['train/accuracy']:.2f} at last"
    )
    sizes = {"num_prompts_per_step": 8, "num_generations_per_prompt": 8, "learning_rate": 1e-2, "max_steps": 15}
    policy = Trainer(
        {
            "algorithm": "grpo",
            **SMALL,
            **sizes,
            "run_dir": str(folder / "grpo"),
            "generation": {"max_new_tokens": 8},
            "reward": {"name": "reward_model", "options": {"model": str(trained.model_path), "batch_size": 16}},
        }
    )
    scores = [step["reward/mean"] for step in policy.fit([{"prompt": f"{n}?"} for n in range(64)]).history]
    print(f"score {scores[0]:.2f} at first, {sum(scores[-3:]) / 3:.2f} at last")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
