"""Optimizer steps on one device."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_rl_core.backends.schedule import learning_rate_factor
from nemo_rl_core.errors import ConfigError, InvariantViolation
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig, SchedulerConfig
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig


def _weights(backend):
    return {name: tensor.clone() for name, tensor in backend.export_weights()}


SPLITS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[7, 6, 5], [], [4, 3], [2, 1, 0]],
    [[i] for i in range(8)],
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_split_into_micro_batches_takes_the_same_step(make_backend, make_loss, batch, precision):
    norms, losses, weights = [], [], []
    for split in SPLITS:
        backend = make_backend(precision=precision, max_grad_norm=0.5)
        result = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=split))
        norms.append(result.grad_norm)
        losses.append(result.metrics["loss"].total)
        weights.append(_weights(backend))
        assert result.num_tokens == batch.num_tokens
        assert result.metrics["logprob"].count == int(batch["loss_mask"].sum())
    tolerance = 1e-6 if precision == "float32" else 2e-2
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=tolerance)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=max(tolerance, 1e-5))
    if precision == "float32":
        for other in weights[1:]:
            for name, tensor in weights[0].items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_step_equals_one_written_by_hand(make_backend, make_loss, model_name, batch):
    model = load_model(model_name("qwen3"), dtype=torch.float32, seed=3).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    backend = make_backend("qwen3", seed=3, optimizer=config, max_grad_norm=0.1)
    for _ in range(3):
        result = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=[[0, 1, 2], [3, 4, 5, 6, 7]]))
        total = torch.zeros(())
        parts = zip(*(batch.unpack(n) for n in ("input_ids", "loss_mask", "advantages")), strict=True)
        for ids, mask, advantages in parts:
            table = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            logprobs = table.gather(1, ids[1:, None]).squeeze(1)
            total = total - (logprobs * advantages[1:] * mask[1:]).sum()
        optimizer.zero_grad()
        (total / batch["loss_mask"].sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    expected = dict(model.named_parameters())
    for name, tensor in backend.export_weights():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing_but_memory(make_backend, make_loss, batch):
    plan = StepPlan(micro_batches=[range(8)])
    plain, saving = make_backend(), make_backend(activation_checkpointing=True)
    calls = []
    layer = saving.model.base_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert plain.train_step(batch, make_loss(batch), plan) == saving.train_step(batch, make_loss(batch), plan)
    assert len(calls) == 2  # once forward, once again in the backward pass


def test_without_update_nothing_changes_and_the_loss_is_that_of_the_step(make_backend, make_loss, batch):
    backend = make_backend()
    before = _weights(backend)
    looked = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[1], update=False))
    assert all(torch.equal(before[n], t) for n, t in _weights(backend).items())
    assert all(p.grad is None for p in backend.parameters)
    stepped = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[1]))
    assert looked.metrics["loss"].total == pytest.approx(stepped.metrics["loss"].total, rel=1e-6)
    assert looked.grad_norm == 0.0 < stepped.grad_norm


def test_a_batch_with_nothing_to_train_takes_no_step_but_decay(make_backend, make_loss, batch):
    batch.set_tokens("loss_mask", torch.zeros(batch.num_tokens, dtype=torch.bool))
    backend = make_backend(optimizer=OptimizerConfig(lr=0.1, weight_decay=0.0))
    before = _weights(backend)
    result = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=[[0, 1], [2]]))
    assert result.grad_norm == 0.0
    assert all(torch.equal(before[n], t) for n, t in _weights(backend).items())


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_backend, make_loss, batch, spoil, precision):
    backend = make_backend(precision=precision)
    before = _weights(backend)
    with pytest.raises(InvariantViolation, match=r"not finite.*weights were not changed"):
        backend.train_step(batch, make_loss(batch, spoil=spoil), StepPlan(micro_batches=SPLITS[0]))
    assert all(torch.equal(before[n], t) for n, t in _weights(backend).items())
    good = backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0]))
    assert math.isfinite(good.grad_norm)


def test_what_stands_in_masked_positions_reaches_nothing(make_backend, make_loss, batch):
    expected = make_backend().train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0]))
    changed = batch["advantages"].clone()
    changed[~batch["loss_mask"]] = 1e30
    batch.set_tokens("advantages", changed)
    found = make_backend().train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0]))
    assert found.grad_norm == expected.grad_norm


def test_metrics_reduce_over_micro_batches(make_backend, make_loss, batch):
    one = make_backend().train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0])).metrics
    many = make_backend().train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[2])).metrics
    assert one["lowest"].reduction == many["lowest"].reduction == "min"
    assert many["lowest"].total == pytest.approx(one["lowest"].total, rel=1e-5)
    assert many["logprob"].total == pytest.approx(one["logprob"].total, rel=1e-5)
    assert isinstance(many["logprob"].total, float)


def test_master_weights_keep_updates_that_bfloat16_loses(make_backend, make_loss, batch):
    """A change of a hundredth of a bfloat16 step per update must add up over many updates."""
    moved = {}
    for keep in (True, False):
        backend = make_backend(
            precision="bfloat16",
            options=DTensorConfig(master_weights=keep),
            optimizer=OptimizerConfig(name="torch.optim.SGD", lr=1e-4, weight_decay=0.0),
        )
        before = _weights(backend)
        for _ in range(12):
            backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0]))
        after = _weights(backend)
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        moved[keep] = sum(int((after[n] != t).sum()) for n, t in before.items())
    assert moved[True] > 4 * moved[False]


def test_exported_weights_are_live_and_tied_ones_come_once(make_backend, make_loss, batch):
    backend = make_backend("qwen2")
    exported = dict(backend.export_weights())
    assert "lm_head.weight" not in exported and "model.embed_tokens.weight" in exported
    copies = {n: t.clone() for n, t in exported.items()}
    backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0]))
    again = dict(backend.export_weights())
    assert all(exported[n].data_ptr() == again[n].data_ptr() for n in again)
    assert all(not torch.equal(exported[n], copies[n]) for n in ("model.embed_tokens.weight", "model.norm.weight"))


# -- optimizers and schedules ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(name="torch.optim.SGD", lr=0.1, options={"momentum": 0.9}),
        OptimizerConfig(name="torch.optim:Adafactor", lr=0.01),
        OptimizerConfig(name="torch.optim.AdamW", lr=0.01, options={"fused": False, "foreach": True, "amsgrad": True}),
        OptimizerConfig(name="torch.optim.RMSprop", lr=0.01),
    ],
    ids=lambda c: c.name,
)
def test_any_torch_optimizer_trains(make_backend, make_loss, batch, config):
    backend = make_backend(optimizer=config)
    losses = [
        backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0])).metrics["loss"].total
        for _ in range(4)
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="torch.optim.Adamw"), r"cannot import 'torch.optim.Adamw'"),
        (OptimizerConfig(name="AdamW"), r"Give the import path"),
        (OptimizerConfig(name="torch.nn.Linear"), r"is not a torch.optim.Optimizer"),
        (OptimizerConfig(options={"momentun": 0.9}), r"does not accept .*momentun"),
    ],
)
def test_a_wrong_optimizer_is_a_clear_error(make_backend, config, message):
    with pytest.raises(ConfigError, match=message):
        make_backend(optimizer=config)


def test_schedules_by_hand():
    linear = SchedulerConfig(name="linear", warmup_steps=2, total_steps=6, min_lr_ratio=0.1)
    assert [learning_rate_factor(linear, s) for s in range(8)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]
    )
    cosine = SchedulerConfig(name="cosine", total_steps=4)
    assert [learning_rate_factor(cosine, s) for s in range(5)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )
    assert learning_rate_factor(SchedulerConfig(), 1000) == 1.0


def test_the_reported_learning_rate_is_the_one_used(make_backend, make_loss, batch):
    backend = make_backend(lr=1.0, scheduler=SchedulerConfig(name="linear", warmup_steps=1, total_steps=3))
    rates = [
        backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=SPLITS[0])).learning_rate for _ in range(4)
    ]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_a_decay_without_an_end_is_refused(make_backend):
    with pytest.raises(ConfigError, match=r"cosine.*total_steps.*max_steps"):
        make_backend(scheduler=SchedulerConfig(name="cosine"))


def test_a_need_that_cannot_be_met_is_refused(make_backend, make_loss, batch):
    with pytest.raises(ConfigError, match=r"does not give values"):
        make_backend().train_step(batch, make_loss(batch, needs=("values",)), StepPlan(micro_batches=SPLITS[0]))


def test_tensor_parallelism_needs_workers(make_backend):
    with pytest.raises(ConfigError, match=r"num_workers is 1. Set policy.num_workers: 2"):
        make_backend(tensor_parallel_size=2)


def test_no_model_name_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"policy.model_name is not set"):
        DTensorBackend().setup(PolicyConfig(), WorkerContext())


def test_shutdown_twice_and_before_setup(make_backend):
    DTensorBackend().shutdown()
    backend = make_backend()
    backend.shutdown()
    backend.shutdown()


def test_a_sequence_of_one_token_is_harmless(make_backend, make_loss):
    batch = BatchedDataDict([1, 3], {"input_ids": torch.tensor([1, 2, 3, 4])})
    batch.set_tokens("loss_mask", torch.tensor([False, False, True, True]))
    batch.set_tokens("advantages", torch.ones(4))
    backend = make_backend()
    assert backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=[[0], [1]])).grad_norm > 0
