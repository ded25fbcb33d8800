"""Checkpoints: bit-equal continuation, damaged files, Hugging Face export."""

from __future__ import annotations

import errno
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.schema import SchedulerConfig
from nemo_rl_plugins_dtensor.config import DTensorConfig

PLAN = StepPlan(micro_batches=[[0, 1, 2], [3, 4, 5, 6, 7]])


def _steps(backend, batch, loss, count):
    return [backend.train_step(batch, loss, PLAN) for _ in range(count)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_backend, make_loss, batch, tmp_path, precision):
    policy = {"precision": precision, "scheduler": SchedulerConfig(name="cosine", warmup_steps=1, total_steps=6)}
    loss = make_loss(batch)
    whole = make_backend(**policy)
    _steps(whole, batch, loss, 2)
    whole.save_checkpoint(tmp_path)
    drawn = (torch.rand(3), random.random())
    expected = _steps(whole, batch, loss, 2)

    resumed = make_backend(seed=99, **policy)
    live = dict(resumed.export_weights())
    resumed.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    assert _steps(resumed, batch, loss, 2) == expected
    for name, tensor in whole.export_weights():
        assert torch.equal(live[name], tensor)  # restored in place: an engine that aliases them sees it


def _damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "damaged":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "damaged", "missing", "empty"])
def test_a_bad_file_is_named_and_nothing_is_loaded(make_backend, make_loss, batch, tmp_path, how):
    backend = make_backend()
    backend.save_checkpoint(tmp_path)
    _damage(tmp_path / "trainer.pt", how)
    _steps(backend, batch, make_loss(batch), 1)
    before = {n: t.clone() for n, t in backend.export_weights()}
    with pytest.raises(CheckpointError, match=rf"trainer\.pt.* {'truncated' if how == 'empty' else how}"):
        backend.load_checkpoint(tmp_path)
    assert all(torch.equal(before[n], t) for n, t in backend.export_weights())


def test_an_unfinished_save_is_recognised(make_backend, tmp_path):
    backend = make_backend()
    backend.save_checkpoint(tmp_path)
    (tmp_path / "trainer.pt.crc.json").unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.pt\.crc\.json.*not finished"):
        backend.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "qwen3"}, "other parameters"),
        ({"precision": "bfloat16"}, "its precision is 'float32', here it is 'bfloat16'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make_backend, tmp_path, change, reason):
    make_backend("qwen2").save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit this run.*{reason}"):
        make_backend(**change).load_checkpoint(tmp_path)


def test_master_weights_cannot_come_from_a_checkpoint_without(make_backend, tmp_path):
    make_backend(precision="bfloat16", options=DTensorConfig(master_weights=False)).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="master_weights differs"):
        make_backend(precision="bfloat16").load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_whole(make_backend, make_loss, batch, tmp_path, monkeypatch):
    backend = make_backend()
    backend.save_checkpoint(tmp_path)
    expected = backend.get_logprobs(batch)
    _steps(backend, batch, make_loss(batch), 1)

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"trainer\.pt.*No space left.*free space"):
            backend.save_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trainer.pt", "trainer.pt.crc.json"]
    backend.load_checkpoint(tmp_path)
    assert torch.equal(backend.get_logprobs(batch), expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "gpt2"])
def test_an_exported_model_is_the_policy(make_backend, make_loss, batch, tmp_path, family):
    backend = make_backend(family)
    _steps(backend, batch, make_loss(batch), 2)
    backend.export_model(tmp_path)
    assert (tmp_path / "config.json").is_file() and list(tmp_path.glob("*.safetensors"))
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    exported = dict(backend.export_weights())
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[n], t) for n, t in exported.items())
    again = make_backend(model_name=str(tmp_path))
    torch.testing.assert_close(again.get_logprobs(batch), backend.get_logprobs(batch), rtol=1e-6, atol=1e-6)
