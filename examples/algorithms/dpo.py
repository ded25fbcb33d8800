"""DPO on a CPU in seconds: a model of random weights learns to prefer even digits to odd ones.

python dpo.py                       # 40 steps
python dpo.py loss=simpo            # or any other loss of the family
"""

from __future__ import annotations

import random
import sys

from nemo_rl_core.config import finalize, load_config
from nemo_rl_plugins_dpo.trainer import DPOTrainer


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts with an answer of even digits and one of odd digits, each of random length."""
    rng = random.Random(seed)

    def answer(digits: str) -> str:
        return "".join(rng.choice(digits) for _ in range(rng.randint(2, 6)))

    return [
        {"prompt": f"{rng.randrange(1000)}?", "chosen": answer("02468"), "rejected": answer("13579")}
        for _ in range(count)
    ]


if __name__ == "__main__":  # arguments are overrides: `python dpo.py max_steps=100 loss=ipo`
    settings = {
        "algorithm": "dpo",
        "model": "scratch:qwen2-tiny",
        "learning_rate": 3e-3,
        "batch_size": 16,
        "max_steps": 40,
        "policy": {"max_sequence_length": 32},
        "validation": {"every": 10, "at_start": True},
    }
    trainer = DPOTrainer(finalize(load_config(settings, overrides=sys.argv[1:])))
    history = trainer.fit(pairs(400, seed=0), validation_dataset=pairs(64, seed=1)).history
    held_out = [step["validation/rewards/accuracies"] for step in history if "validation/rewards/accuracies" in step]
    print(f"held-out accuracy {held_out[0]:.2f} at first, {held_out[-1]:.2f} at last")
