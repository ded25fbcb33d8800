"""A checkpoint of another run is refused with what differs; the contract of the kind tests the rest."""

from __future__ import annotations

import pytest

from nemo_rl_core.errors import CheckpointError
from nemo_rl_plugins_megatron.config import MegatronConfig


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": "qwen2"}, "other parameters"),
        ({"precision": "bfloat16"}, "its precision is 'float32', here it is 'bfloat16'"),
        ({"options": MegatronConfig(distributed_optimizer=False)}, "its distributed_optimizer is True"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make_backend, tmp_path, change, reason):
    make_backend().save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit this run.*{reason}"):
        make_backend(**change).load_checkpoint(tmp_path)
