"""PPO with a critic on a CPU in half a minute: a tiny policy learns to answer in vowels; half of the prompts pay none.

The critic is warmed up for three steps before the policy moves; it learns which prompts pay, and its explained variance
says how much of the reward it foresees. Arguments are overrides: `python ppo.py max_steps=100 critic.num_workers=2`.
"""

from __future__ import annotations

import sys

from nemo_rl import PPOTrainer
from nemo_rl_core.config import finalize, load_config


async def vowels(response: str, worth: int) -> float:
    """The share of vowels, if the prompt is worth anything."""
    return worth * sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def main() -> None:
    """Train, and print how reward and critic went."""
    settings = {
        "algorithm": "ppo",
        "model": "scratch:qwen2-tiny",
        "learning_rate": 2e-3,
        "critic_learning_rate": 1e-2,
        "critic_warmup_steps": 3,
        "num_prompts_per_step": 16,
        "num_generations_per_prompt": 4,
        "updates_per_step": 2,
        "epochs_per_step": 2,
        "critic_epochs_per_step": 4,
        "max_steps": 30,
        "run_dir": "runs/example-ppo",
        "policy": {"max_sequence_length": 24},
        "generation": {"max_new_tokens": 8},
        "advantage": {"name": "gae", "options": {"critic_lambda": 1.0}},
    }
    trainer = PPOTrainer(finalize(load_config(settings, overrides=sys.argv[1:])))
    history = trainer.fit([{"prompt": f"{n % 2}:", "worth": n % 2} for n in range(64)], vowels).history
    for name in ("reward/mean", "train/critic/explained_variance"):
        values = [entry[name] for entry in history if name in entry]
        print(f"{name}: {values[0]:.3f} at first, {sum(values[-5:]) / len(values[-5:]):.3f} at last")


if __name__ == "__main__":
    main()
