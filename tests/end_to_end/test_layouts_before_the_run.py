"""What workers and sizes amount to is said, and refused, before any worker starts."""

from __future__ import annotations

import pytest

from nemo_rl_core.config import arithmetic, finalize, load_config
from nemo_rl_core.schema import InvalidConfig
from nemo_rl_core.training.run import run
from nemo_rl_core.training.setup.model_checks import check_models, configured_models
from nemo_rl_core.training.setup.parts import RunInputs

SPLIT = {"pipeline_parallel_size": 2, "context_parallel_size": 2}


def configured(backend="megatron", options=None, run_dir="unused", **policy):
    tree = {
        "algorithm": "sft",
        "model": "scratch:qwen2-tiny",  # 2 layers, 2 heads, 1 key-value head
        "policy": {"backend": backend, "options": options or {}, **policy},
        "cluster": {"device": "cpu"},
        "max_steps": 1,
        "run_dir": str(run_dir),
    }
    return finalize(load_config(tree))


def test_all_that_splits_a_replica_counts():
    config = configured(num_workers=8, tensor_parallel_size=2, options=SPLIT)
    check_models(configured_models(config))
    (row,) = [row for row in arithmetic(config) if row.quantity == "model replicas"]
    assert row.value == 1
    assert row.why.endswith("tensor_parallel_size 2 x policy.options.pipeline_parallel_size 2 x "
                            "policy.options.context_parallel_size 2)")  # fmt: skip
    (row,) = [row for row in arithmetic(configured(num_workers=8, options=SPLIT)) if row.quantity == "model replicas"]
    assert row.value == 2
    with pytest.raises(InvalidConfig, match=r"6 workers cannot be divided into replicas of pipeline_p.*, 4 workers"):
        configured(num_workers=6, options=SPLIT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 3, "options": {"pipeline_parallel_size": 3}}, r"3 does not divide .*num_hidden_layers 2"),
        ({"num_workers": 4, "tensor_parallel_size": 4}, r"4 does not divide .*num_attention_heads 2"),
        ({"num_workers": 2, "options": {"expert_parallel_size": 2}}, r"qwen2 models have no experts"),
        (
            {"backend": "dtensor", "num_workers": 2, "tensor_parallel_size": 2},
            r"2 does not divide the model's num_key_value_heads 1",
        ),
    ],
)
def test_a_size_that_does_not_fit_the_model_stops_the_run_before_a_worker_starts(tmp_path, settings, message):
    config = configured(run_dir=tmp_path / "run", **settings)
    with pytest.raises(InvalidConfig, match=message):
        check_models(configured_models(config))  # as `--dry-run` does
    rows = [{"prompt": "1+1=", "answer": "2", "response": "2"}]
    with pytest.raises(InvalidConfig, match=message):
        run(config, RunInputs(train_rows=rows))
