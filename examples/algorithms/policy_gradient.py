"""GRPO and its relatives on a CPU in seconds: a model of 0.1 million random weights learns to write vowels.

python policy_gradient.py                                   # GRPO: a group of rollouts is its own baseline
python policy_gradient.py algorithm=dapo                    # or gspo, cispo, dr_grpo, rloo, reinforce_pp
python policy_gradient.py algorithm=rloo max_steps=100      # arguments are overrides
"""

from __future__ import annotations

import sys
from typing import Any

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.training.trainer import Trainer

COMMON: dict[str, Any] = {
    "model": "scratch:qwen2-tiny",
    "learning_rate": 0.01,
    "max_steps": 25,
    "num_prompts_per_step": 8,
    "num_generations_per_prompt": 8,
    "policy": {"max_sequence_length": 24},
    "generation": {"max_new_tokens": 8},
}
OWN: dict[str, dict[str, Any]] = {
    "grpo": {},
    # Clip-higher and a penalty for length; groups without a signal are sampled anew, so a step may take many.
    "dapo": {"max_steps": 20, "dynamic_sampling": {"max_batches": 30}},
    # Ratio and clip of whole sequences, which take effect from the second optimizer step of a batch on.
    "gspo": {"updates_per_step": 2},
    # Bounded weights in place of a clip.
    "cispo": {"updates_per_step": 2},
    # No division by length and deviation.
    "dr_grpo": {},
    # The plain policy gradient with a leave-one-out baseline, and a KL in the reward.
    "rloo": {"reward_kl": {"beta": 0.01}},
    # One rollout a prompt: the whole batch is the baseline, and a KL is taken from the reward of each token.
    "reinforce_pp": {"num_prompts_per_step": 64, "num_generations_per_prompt": 1},
}


async def vowels(response: str) -> float:
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def main(overrides: list[str]) -> None:
    """Train, and tell how far it came."""
    named = [word.partition("=")[2] for word in overrides if word.startswith("algorithm=")]
    name = named[-1] if named else "grpo"
    if name not in OWN:
        raise SystemExit(f"algorithm={name}: this example is for {', '.join(OWN)}.")
    settings = {**COMMON, **OWN[name], "algorithm": name, "run_dir": f"runs/example-{name}"}
    trainer = Trainer(finalize(load_config(settings, overrides=overrides)))
    rewards = [step["reward/mean"] for step in trainer.fit([{"prompt": f"{n}:"} for n in range(64)], vowels).history]
    print(f"reward {rewards[0]:.3f} at first, {sum(rewards[-5:]) / len(rewards[-5:]):.3f} at last")


if __name__ == "__main__":
    main(sys.argv[1:])
