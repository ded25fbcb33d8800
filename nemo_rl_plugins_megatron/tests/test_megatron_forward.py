"""What the model gives is what the Hugging Face model gives, for every family."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.loss import LossSums
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.schema import OptimizerConfig
from nemo_rl_core.testing.conformance.cases.reference import (
    ReferenceTrainer,
    WeightedLoss,
    forward_logits,
    forward_logprobs,
)
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_megatron import model
from nemo_rl_plugins_megatron._megatron import _LOWEST, check_version
from nemo_rl_plugins_megatron.attention import PackedAttention, attend_end
from nemo_rl_plugins_megatron.config import MegatronConfig
from nemo_rl_plugins_megatron.cpu import NO_FUSIONS, attend_end_on_cpu


class LogitsLoss:
    """Keeps the logits that a loss is given."""

    needs = frozenset({"logits"})
    denominator = "tokens"

    def __call__(self, outputs, batch):
        self.logits = outputs.logits.detach()
        return LossSums(outputs.logits[batch["loss_mask"]].sum())


def _step(backend, batch, loss=None, **plan):
    plan = {"micro_batches": [range(len(batch))], **plan}
    return backend.train_step(batch, NormalizedLoss(loss or WeightedLoss(), count_trained(batch)), StepPlan(**plan))


@pytest.mark.parametrize("shape", ["llama", "llama_scaled_rope", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed"])
def test_logits_and_logprobs_are_those_of_the_hugging_face_model(make_backend, model_name, batch, shape):
    backend, model = make_backend(shape), load_model(model_name(shape), dtype=torch.float32)
    loss = LogitsLoss()
    _step(backend, batch, loss, update=False)
    mask = batch["loss_mask"]
    expected = torch.cat([forward_logits(model, ids).roll(1, 0) for ids in batch.unpack("input_ids")])
    torch.testing.assert_close(loss.logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    found = backend.get_logprobs(batch, 0.7)
    torch.testing.assert_close(found[mask], forward_logprobs(model, batch, 0.7)[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
def test_the_gradient_is_that_of_the_hugging_face_model_also_where_padding_was_sampled(
    make_backend, model_name, batch, shape
):
    model = load_model(model_name(shape), dtype=torch.float32)
    assert model.config.pad_token_id in (None, 73)
    assert 73 in batch["input_ids"]
    expected = ReferenceTrainer(model, OptimizerConfig(lr=0.0)).step(batch).grad_norm
    assert _step(make_backend(shape, max_grad_norm=None), batch).grad_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", ["qwen3", "qwen3_moe"])
def test_recomputed_activations_take_the_same_step(make_backend, batch, shape):
    plain, recomputed = make_backend(shape), make_backend(shape, activation_checkpointing=True)
    calls = []
    for module in recomputed.model.modules():
        if isinstance(module, PackedAttention):
            module.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert _step(recomputed, batch) == _step(plain, batch)
    assert len(calls) == 2 * 2 * 2  # steps, layers, once more each
    for (_, one), (_, other) in zip(recomputed.export_weights(), plain.export_weights(), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_keeps_updates_that_are_below_its_steps(make_backend, batch):
    backend = make_backend(precision="bfloat16", lr=1e-5)
    assert {t.dtype for _, t in backend.export_weights()} == {torch.bfloat16}
    before = {name: t.clone() for name, t in backend.export_weights()}
    for _ in range(60):
        _step(backend, batch)
    moved = [float((t.float() - before[name].float()).abs().max()) for name, t in backend.export_weights()]
    assert max(moved) >= 3e-4  # 60 steps of 1e-5 add up, though each is lost in a weight of 0.1


def test_a_gpu_takes_the_fused_kernels_that_are_installed_and_they_compute_the_same(make_backend, batch, monkeypatch):
    found = model.fusions(torch.device("cuda"), trained=True)
    assert found.keys() == NO_FUSIONS.keys()
    assert [name for name, on in found.items() if on] == ["bias_activation_fusion", "bias_dropout_fusion"]
    monkeypatch.setattr(model.rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *args: None)
    monkeypatch.setattr(model.layers, "_grad_accum_fusion_available", True)
    assert all(model.fusions(torch.device("cuda"), trained=True).values())
    assert not model.fusions(torch.device("cuda"), trained=False)["gradient_accumulation_fusion"]
    plain = make_backend()
    monkeypatch.setattr(model, "fusions", lambda device, trained: found)  # without a compiler they run on a CPU too
    fused = make_backend()
    assert fused.model.config.bias_activation_fusion
    torch.testing.assert_close(fused.get_logprobs(batch), plain.get_logprobs(batch), rtol=1e-6, atol=1e-6)
    assert _step(fused, batch).grad_norm == pytest.approx(_step(plain, batch).grad_norm, rel=1e-5)


@pytest.mark.parametrize("distributed", [True, False])
def test_masters_have_the_float32_values_of_the_model(make_backend, model_name, distributed):
    options = MegatronConfig(distributed_optimizer=distributed)
    rounded, exact = make_backend("qwen2", precision="bfloat16", options=options), make_backend("qwen2")
    computes = dict(rounded.export_weights())
    for name, tensor in exact.export_weights():
        assert torch.equal(computes[name], tensor.bfloat16()), name
    names = {id(tensor): name for name, tensor in rounded.weights.parameters.items()}
    shares = list(rounded.optimizer.shares())
    assert len(shares) == len(names)
    for share in shares:
        expected = exact.weights.parameters[names[id(share.weight)]].flatten()
        assert torch.equal(share.tensors["param"].flatten(), expected[share.part])


def test_a_frozen_model_takes_no_steps(make_backend, batch):
    backend = make_backend(trained=False)
    assert backend.optimizer is None and not any(p.requires_grad for p in backend.model.parameters())
    with pytest.raises(ConfigError, match="frozen"):
        _step(backend, batch)
    assert _step(backend, batch, update=False).metrics["loss"].total == pytest.approx(
        _step(make_backend(), batch, update=False).metrics["loss"].total
    )


def test_models_of_one_process_share_its_groups(make_backend, batch):
    policy, reference = make_backend(), make_backend(trained=False)
    policy.shutdown()
    assert reference.get_logprobs(batch).isfinite().all()


def test_another_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.18.2")
    with pytest.raises(ConfigError, match=rf"{_LOWEST}.*installed is 0\.18\.2.*pip install"):
        check_version()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 7), (4, 4), (1, 5)])
def test_the_end_of_a_sequence_attends_as_in_the_whole_on_either_device(num_queries, num_keys):
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, num_keys, 8, generator=rng)
    key, value = (torch.randn(1, 2, num_keys, 8, generator=rng) for _ in range(2))
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for attend in (attend_end, attend_end_on_cpu):
        found = attend(query[:, :, -num_queries:], key, value)
        torch.testing.assert_close(found, whole[:, :, -num_queries:], rtol=1e-5, atol=1e-6)
