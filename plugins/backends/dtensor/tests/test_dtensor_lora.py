"""LoRA: what is trained, what leaves as weights, what is saved, and that it is what PEFT does."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from nemo_rl_core.errors import CheckpointError, ConfigError
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_core.testing import TrainingBackendContract, run_kit
from nemo_rl_core.testing.conformance.cases.reference import ReferenceTrainer, WeightedLoss, tiny_model
from nemo_rl_core.testing.conformance.cases.training_bench import OPTIMIZER
from nemo_rl_core.training.model.policy import InitialModel, Policy
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig, LoRAConfig

peft = pytest.importorskip("peft")


def options(**lora):
    return DTensorConfig(lora=LoRAConfig(**{"rank": 4, **lora}))


def step(backend, batch, loss_fn, micro_batches=None):
    plan = StepPlan(micro_batches=micro_batches or [list(range(len(batch)))])
    return backend.train_step(batch, loss_fn, plan)


def trained_steps(backend, make_batch, make_loss, num=3):
    for seed in range(num):
        batch = make_batch(seed=seed)
        step(backend, batch, make_loss(batch))
    return backend


def exported(backend):
    return {name: tensor.clone() for name, tensor in backend.export_weights()}


# -- the contract of every training backend ----------------------------------------------------------------


class PeftTrainer(ReferenceTrainer):
    """The plain loop over PEFT's own model; its weights are those of `merge_and_unload`."""

    def __init__(self, model, optimizer, **kwargs):
        super().__init__(model, optimizer, **kwargs)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def weights(self):
        import copy

        yield from ((n, p.detach()) for n, p in copy.deepcopy(self.model).merge_and_unload().named_parameters())


@pytest.fixture(scope="module")
def adapter_of_tiny(tmp_path_factory):
    """An adapter of the kit's model with A random and B zero, written by PEFT."""
    return write_adapter(tmp_path_factory.mktemp("adapter"))


def write_adapter(folder):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft.get_peft_model(tiny_model().copy(), config).save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": tiny_model().folder}))
    return str(folder)


class TestBackendWithLoRA(TrainingBackendContract):
    """Every clause; the loop it is compared with trains PEFT's own model."""

    num_processes = 0  # below

    @pytest.fixture(autouse=True)
    def _adapter(self, adapter_of_tiny, monkeypatch):
        monkeypatch.setattr(type(self), "config_options", {"lora": LoRAConfig(path=adapter_of_tiny)}, raising=False)
        self.adapter = adapter_of_tiny

    @pytest.fixture
    def backend(self):
        return DTensorBackend

    def reference(self, max_grad_norm=None):
        model = peft.PeftModel.from_pretrained(self.tiny.copy(), self.adapter, is_trainable=True)
        return PeftTrainer(model, OPTIMIZER, max_grad_norm=max_grad_norm)


# -- against PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merged_weights_are_those_of_peft(make_backend, model_name, make_batch, make_loss, tmp_path, family):
    backend = trained_steps(make_backend(family, options=options(export="adapter")), make_batch, make_loss)
    backend.export_model(tmp_path)
    base = load_model(model_name(family), dtype=torch.float32, seed=0)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    merged = dict(loaded.merge_and_unload().named_parameters())
    found = exported(backend)
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    # Another backend with these weights as its own: the logprobs of base and adapter are those of the sum.
    other = make_backend(family)
    with torch.no_grad():
        for name, parameter in other.weights.items():
            parameter.copy_(found[name])
    batch = make_batch(seed=9)
    assert torch.allclose(backend.get_logprobs(batch), other.get_logprobs(batch), atol=1e-5)
    assert not torch.allclose(backend.get_logprobs(batch), make_backend(family).get_logprobs(batch), atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"rank_stabilized": True, "alpha": 3.0}, {"target_modules": ("q_proj",)}])
def test_a_new_adapter_changes_nothing(make_backend, batch, changes):
    found, plain = make_backend(options=options(**changes)), make_backend()
    assert torch.equal(found.get_logprobs(batch), plain.get_logprobs(batch))
    assert all(torch.equal(value, plain.weights[name]) for name, value in found.export_weights())


def test_the_scale_is_alpha_over_rank(make_backend):
    for changes, scale in (({}, 2.0), ({"alpha": 6.0}, 1.5), ({"rank_stabilized": True, "alpha": 6.0}, 3.0)):
        backend = make_backend(options=options(**changes))
        layers = backend.adapters.layers.values()
        assert {layer.scaling["default"] for layer in layers} == {scale}
        assert len(layers) == 2 * 7  # every linear layer of two blocks


def test_only_adapters_get_gradient_and_optimizer_state(make_backend, make_batch, make_loss):
    backend = make_backend(options=options())
    before = {name: p.detach().clone() for name, p in backend.weights.items()}
    trained_steps(backend, make_batch, make_loss, num=1)
    changed = {name for name, p in backend.weights.items() if not torch.equal(p, before[name])}
    # In the first step B is 0, and so is the gradient of A; AdamW's weight decay shrinks A all the same.
    assert changed == set(backend.adapters.trained())
    assert all(".lora_" in name for name in changed)
    in_state = sum(len(group["params"]) for group in backend.optimizer.param_groups)
    assert in_state == len(changed) == len(backend.optimizer.state)


def test_training_leaves_the_weights_of_the_model_alone_during_a_refit(make_backend, make_batch, make_loss):
    backend = trained_steps(make_backend(options=options()), make_batch, make_loss)
    before = {name: p.detach().clone() for name, p in backend.weights.items()}
    assert list(backend.export_weights())
    assert all(torch.equal(p, before[name]) for name, p in backend.weights.items())
    assert "share_weights" not in backend.capabilities
    assert "share_weights" in make_backend().capabilities


# -- the model as it was -----------------------------------------------------------------------------------


def test_initial_weights_of_a_new_adapter_are_the_models(make_backend, batch, make_batch, make_loss):
    backend = make_backend(options=options())
    start = backend.get_logprobs(batch)
    trained_steps(backend, make_batch, make_loss)
    now = backend.get_logprobs(batch)
    backend.use_initial_weights(True)
    assert torch.equal(backend.get_logprobs(batch), start)
    backend.use_initial_weights(False)
    assert torch.equal(backend.get_logprobs(batch), now)
    assert not torch.allclose(now, start, atol=1e-3)
    plain = make_backend()
    assert backend.has_initial_weights() and not plain.has_initial_weights()
    with pytest.raises(ConfigError, match="keeps no initial weights"):
        plain.use_initial_weights(True)


def test_initial_weights_of_a_stored_adapter_have_that_adapter(make_backend, batch, make_batch, make_loss, tmp_path):
    trained_steps(make_backend(options=options()), make_batch, make_loss).export_model(tmp_path)
    backend = make_backend(options=DTensorConfig(lora=LoRAConfig(path=str(tmp_path))))
    start = backend.get_logprobs(batch)
    trained_steps(backend, make_batch, make_loss)
    now = backend.get_logprobs(batch)
    backend.use_initial_weights(True)
    assert torch.equal(backend.get_logprobs(batch), start)
    backend.use_initial_weights(False)
    assert torch.equal(backend.get_logprobs(batch), now)


# -- folders -----------------------------------------------------------------------------------------------


def test_an_adapter_goes_to_peft_and_comes_back(make_backend, model_name, batch, make_batch, make_loss, tmp_path):
    backend = trained_steps(make_backend(options=options(alpha=5.0)), make_batch, make_loss)
    backend.export_model(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(
        load_model(model_name("qwen2"), dtype=torch.float32, seed=0), tmp_path / "ours"
    )
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = make_backend(options=DTensorConfig(lora=LoRAConfig(path=str(tmp_path / "theirs"))))
    assert torch.equal(again.get_logprobs(batch), backend.get_logprobs(batch))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 5.0, model_name("qwen2"))


def test_both_exports_write_the_merged_model_and_the_adapter_below(
    make_backend, batch, make_batch, make_loss, tmp_path
):
    backend = trained_steps(make_backend("llama", options=options(export="both")), make_batch, make_loss)
    backend.export_model(tmp_path)
    merged = make_backend(model_name=str(tmp_path))
    assert torch.allclose(merged.get_logprobs(batch), backend.get_logprobs(batch), atol=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter_config.json").exists()


def test_checkpoints_hold_adapters_only_and_continue_bit_for_bit(make_backend, make_batch, make_loss, tmp_path):
    whole = trained_steps(make_backend(options=options()), make_batch, make_loss, num=4)
    first = trained_steps(make_backend(options=options()), make_batch, make_loss, num=2)
    first.save_checkpoint(tmp_path)
    state = torch.load(tmp_path / "trainer.pt", weights_only=True)
    assert all(".lora_" in name for name in state["weights"])
    second = make_backend(options=options())
    second.load_checkpoint(tmp_path)
    for seed in (2, 3):
        batch = make_batch(seed=seed)
        step(second, batch, make_loss(batch))
    a, b = exported(whole), exported(second)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "weights below the adapters are others"),
        ({"options": options(rank=8)}, "other shapes"),
        ({"options": options(target_modules=("q_proj",))}, "other parameters"),
        ({"options": DTensorConfig()}, "other parameters"),
    ],
)
def test_a_checkpoint_of_another_model_or_adapter_is_refused(make_backend, tmp_path, changes, says):
    make_backend(options=options()).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        make_backend(**{"options": options(), **changes}).load_checkpoint(tmp_path)


# -- with everything else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_packing_and_activation_checkpointing_take_the_same_step(
    make_backend, batch, make_loss, attention, activation_checkpointing
):
    expected = make_backend(options=options())
    settings = DTensorConfig(attention=attention, share_prefixes=False, lora=LoRAConfig(rank=4))
    found = make_backend(options=settings, activation_checkpointing=activation_checkpointing)
    norms = [step(backend, batch, make_loss(batch)).grad_norm for backend in (expected, found)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0
    parts = [[0, 3], [1], [], [7, 2, 4], [5, 6]]
    cut = make_backend(options=settings, activation_checkpointing=activation_checkpointing)
    assert step(cut, batch, make_loss(batch), parts).grad_norm == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("master_weights", [True, False])
def test_bfloat16_trains_adapters_on_a_bfloat16_model(make_backend, batch, make_loss, master_weights, tmp_path):
    settings = DTensorConfig(master_weights=master_weights, lora=LoRAConfig(rank=4))
    backend = make_backend(options=settings, precision="bfloat16", lr=1e-2)
    assert {p.dtype for p in backend.weights.values()} == {torch.bfloat16}
    losses = [float(step(backend, batch, make_loss(batch)).metrics["loss"].total) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {value.dtype for _, value in backend.export_weights()} == {torch.bfloat16}
    if master_weights:
        assert len(backend.masters.masters) == len(backend.adapters.trained())
        assert all(master.dtype == torch.float32 for master in backend.masters.masters)
    backend.save_checkpoint(tmp_path)
    backend.load_checkpoint(tmp_path)


def test_dropout_is_on_in_training_steps_only(make_backend, batch, make_loss):
    backend = make_backend(options=options(dropout=0.5))
    for layer in backend.adapters.layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    assert torch.equal(backend.get_logprobs(batch), backend.get_logprobs(batch))
    evaluated = [
        backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=[list(range(len(batch)))], update=False))
        for _ in range(2)
    ]
    assert evaluated[0].metrics["loss"].total == evaluated[1].metrics["loss"].total
    stepped = step(backend, batch, make_loss(batch))
    assert not math.isclose(stepped.metrics["loss"].total, evaluated[0].metrics["loss"].total, rel_tol=1e-6)


def test_a_scalar_head_is_trained_and_saved_with_the_adapters(make_backend, model_name, batch, tmp_path):
    from nemo_rl_core.protocols.loss import LossSums
    from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained

    class Squares:
        denominator, needs = "tokens", frozenset({"values"})

        def __call__(self, outputs, batch):
            return LossSums(((outputs.values - batch["advantages"]).square() * batch["loss_mask"]).sum())

    backend = make_backend(options=options(), head="scalar", lr=1e-1)
    assert any(name == "score.weight" for name in backend.adapters.trained())
    start = backend.get_values(batch)
    losses = [step(backend, batch, NormalizedLoss(Squares(), count_trained(batch))) for _ in range(5)]
    assert losses[-1].metrics["loss"].total < losses[0].metrics["loss"].total
    backend.use_initial_weights(True)
    assert torch.equal(backend.get_values(batch), start)
    backend.use_initial_weights(False)
    backend.export_model(tmp_path)
    again = make_backend(options=DTensorConfig(lora=LoRAConfig(path=str(tmp_path))), head="scalar", seed=0)
    assert torch.equal(again.get_values(batch), backend.get_values(batch))
    base = load_model(model_name("qwen2"), dtype=torch.float32, seed=0, head="scalar")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    merged = theirs.merge_and_unload()
    assert torch.allclose(merged.score.weight, dict(backend.export_weights())["score.weight"])


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    options = {"lora": LoRAConfig(path=write_adapter(tmp_path))}
    contract = type("WithAdapter", (TrainingBackendContract,), {"config_options": options})
    (result,) = run_kit(contract, lambda: DTensorBackend, only=["data_parallel"]).results
    assert result.outcome == "passed", result.message


@pytest.mark.slow
def test_two_processes_in_bfloat16(model_name, make_batch, tmp_path):
    """Sharded bfloat16 weights below float32 adapters: initial weights, export and checkpoint work over ranks."""
    config = PolicyConfig(
        model_name=model_name("llama"),
        options=options(),
        num_workers=2,
        precision="bfloat16",
        optimizer=OptimizerConfig(lr=1e-2),
    )
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    factory = get_registry().resolve("training_backends", DTensorBackend)
    try:
        policy = Policy(
            launcher.launch(WorkerSpec(role="policy", factory=factory, config=config, num_workers=2)), token_budget=40
        )
        batch = make_batch()
        start = policy.logprobs(batch)
        losses = [policy.train_step(batch, WeightedLoss())["loss"] for _ in range(4)]
        assert losses[-1] < losses[0]
        assert torch.equal(InitialModel(policy).logprobs(batch), start)
        now = policy.logprobs(batch)
        policy.save(tmp_path / "saved")
        policy.train_step(batch, WeightedLoss())
        policy.load(tmp_path / "saved")
        assert torch.equal(policy.logprobs(batch), now)
        assert sorted(p.name for p in (tmp_path / "saved").glob("*.pt")) == ["trainer-rank0.pt", "trainer-rank1.pt"]
        names = [name for name, _ in policy.group.iterate("export_weights", timeout_s=60.0)]
        assert not [name for name in names if "lora" in name or "base_layer" in name]
        policy.export_model(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").is_file()
    finally:
        launcher.shutdown()


def test_a_frozen_model_has_no_adapters(make_backend, batch, tmp_path):
    """A teacher has the policy's options, and is not the policy's adapter."""
    write_adapter(tmp_path)
    teacher = make_backend(options=DTensorConfig(lora=LoRAConfig(path=str(tmp_path))), trained=False)
    assert teacher.adapters is None and "share_weights" in teacher.capabilities
    assert torch.equal(teacher.get_logprobs(batch), make_backend().get_logprobs(batch))


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_folder_of_an_adapter_is_a_model(make_backend, make_batch, make_loss, tmp_path, head):
    """What the core loads from it is what the backend gives to an engine."""
    backend = make_backend(options=options(), head=head, lr=1e-1)
    with torch.no_grad():
        for name, parameter in backend.adapters.trained().items():
            parameter.add_(0.1 if "lora_B" in name or name == "score.weight" else 0.0)
    backend.export_model(tmp_path)
    loaded = dict(load_model(str(tmp_path), dtype=torch.float32, head=head).named_parameters())
    weights = exported(backend)
    assert weights.keys() == loaded.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(loaded[name].detach(), weight, rtol=0, atol=1e-6)


# -- what a user may get wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": ("q_prj",)}, r"target_modules: .*q_prj.*Linear layers of Qwen2ForCausalLM: .*q_proj"),
        ({"target_modules": ("embed_tokens",)}, "embed_tokens is the model's embedding"),
        ({"path": "/nowhere"}, "/nowhere holds no adapter"),
    ],
)
def test_mistakes_are_named(make_backend, changes, says):
    with pytest.raises(ConfigError, match=says):
        make_backend(options=options(**changes))


def test_the_output_layer_is_refused(make_backend):
    with pytest.raises(ConfigError, match="lm_head is the model's output layer"):
        make_backend("llama", options=options(target_modules=("lm_head",)))


def test_an_adapter_that_does_not_fit_is_named(make_backend, tmp_path):
    make_backend("qwen2", options=options()).export_model(tmp_path)
    for changes, says in (
        ({"rank": 8}, "rank is 8, but the adapter in .* has 4"),
        ({"rank": None, "target_modules": ("q_proj",)}, "are those of the adapter in `path`"),
    ):
        with pytest.raises(ConfigError, match=says):
            make_backend(options=options(path=str(tmp_path), **changes))
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        make_backend(options=options(path=str(tmp_path)))
    file.write_bytes(whole)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(ConfigError, match="uses use_dora; only plain LoRA is known"):
        make_backend(options=options(path=str(tmp_path)))


def test_without_peft_it_says_what_to_install(make_backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'nemo-rl-dtensor\[lora\]'"):
        make_backend(options=options())


def test_tensor_parallelism_is_refused(make_backend):
    backend = make_backend()
    backend.config = PolicyConfig(tensor_parallel_size=2, num_workers=2)
    with pytest.raises(ConfigError, match="does not go with policy.tensor_parallel_size"):
        backend._adapt(backend.model, 0, LoRAConfig(), dtype=torch.float32)
