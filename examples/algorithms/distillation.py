"""On-policy distillation on the CPU: a teacher learns sums from answers, a student learns them from the teacher.

Arguments are overrides of the student's run: `python distillation.py loss=reverse_kl max_steps=60`. With `lmbda=0.5`
half of the steps take the answers of the data in place of the student's samples, with `lmbda=0` all of them; with
`top_k=null` the whole vocabulary is compared.
"""

from __future__ import annotations

import sys

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.training.trainer import Trainer

SMALL = {
    "model": "scratch:qwen2-tiny",
    "learning_rate": 0.01,
    "policy": {"max_sequence_length": 32, "optimizer": {"eps": 1e-5}},
}


def correct(response: str, answer: str) -> float:
    """Measured, not learnt from."""
    return float(response.strip() == answer)


if __name__ == "__main__":
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    teacher = Trainer({**SMALL, "algorithm": "sft", "batch_size": 25, "max_steps": 60, "run_dir": "runs/teacher"})
    settings = {
        **SMALL,
        "algorithm": "distillation",
        "teacher": {"model_name": str(teacher.fit(rows).model_path)},
        "num_prompts_per_step": 25,
        "generation": {"max_new_tokens": 4},
        "max_steps": 40,
        "run_dir": "runs/student",
    }
    student = Trainer(finalize(load_config(settings, overrides=sys.argv[1:])))
    history = student.fit(rows, reward_fn=correct).history
    for name in ("train/divergence", "reward/mean"):
        values = [step[name] for step in history if name in step]  # rewards are of steps that sample
        if values:
            print(f"{name} {values[0]:.3f} at first, {sum(values[-5:]) / len(values[-5:]):.3f} at last")
