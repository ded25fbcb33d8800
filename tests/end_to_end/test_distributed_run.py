"""The same configuration on one process, two data-parallel ones and two tensor-parallel ones takes the same steps."""

from __future__ import annotations

import pytest

import nemo_rl

pytestmark = pytest.mark.xdist_group("distributed")  # one worker makes what they share


def reward(response: str) -> float:
    return float(any(c.isdigit() for c in response))


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]

    def run(num_workers: int, tensor_parallel_size: int) -> list[dict[str, float]]:
        config = {
            "model": "scratch:qwen2-1m",
            "learning_rate": 1e-3,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "max_steps": 3,
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "policy": {
                "max_sequence_length": 32,
                "num_workers": num_workers,
                "tensor_parallel_size": tensor_parallel_size,
            },
            "generation": {"max_new_tokens": 4},
            "logging": {"progress": "none"},
            "checkpointing": {"enabled": False},
        }
        return nemo_rl.GRPOTrainer(config).fit(rows, reward).history

    return run


@pytest.fixture(scope="module")
def alone(history):
    return history(1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "tensor_parallel_size"), [(2, 1), (2, 2)])
def test_two_processes_take_the_steps_of_one(history, alone, num_workers, tensor_parallel_size):
    together = history(num_workers, tensor_parallel_size)
    assert any(entry["train/grad_norm"] > 0 for entry in alone)
    for mine, other in zip(together, alone, strict=True):
        for name in ("train/loss", "train/grad_norm", "reward/mean"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        assert mine["train/token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
