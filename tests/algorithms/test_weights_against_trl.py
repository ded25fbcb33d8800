"""The same loss and gradient norm as TRL's trainers on equal *weights* and sequences (skipped where TRL is not there).

Both sides run their own forward and backward pass over the same model: TRL's trainer, set up as by its users, on a
padded batch, and our training backend behind the core's `Policy`, packed and in one micro-batch or several. The loss
agrees to 1e-5, the gradient norm to 1e-4 (relative). What differs on purpose is asserted with its size.

TRL's losses of GRPO that we lack: sapo, vespo, luspo.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attrs import frozen
from pytest import approx

from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_core.training.model.policy import Policy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("weights_against_trl")]

MODEL = "scratch:qwen2-tiny"
PROMPTS, RESPONSES = [4, 2, 7, 3], [3, 6, 1, 4]
ADVANTAGES = [1.0, -0.7, -1.3, 0.4]
LONGEST = 9
"""TRL's `max_completion_length`."""
SEQUENCE = {"importance_sampling_level": "sequence"}


@frozen(eq=False)
class Sides:
    """One model on both sides."""

    folder: str
    policy: Policy


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Weights large enough that the losses are away from their symmetric points; a learning rate of 0 keeps them."""
    folder = tmp_path_factory.mktemp("model")
    model = load_model(MODEL, dtype=torch.float32, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    config = PolicyConfig(
        model_name=str(folder), backend="dtensor", optimizer=OptimizerConfig(lr=0.0), max_grad_norm=None
    )
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu"))
    factory = get_registry().resolve("training_backends", "dtensor")
    group = launcher.launch(WorkerSpec(role="policy", factory=factory, config=config, num_workers=1))
    yield Sides(str(folder), Policy(group, token_budget=1000))
    launcher.shutdown()


@pytest.fixture(scope="module")
def batch(sides):
    """Random tokens, with the logprobs of policies near the current one."""
    generator = torch.Generator().manual_seed(3)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    found = BatchedDataDict(lengths)
    found.set_tokens("input_ids", torch.randint(5, 90, (sum(lengths),), generator=generator))
    found.set_tokens("loss_mask", found.position_ids >= found.expand_to_tokens(torch.tensor(PROMPTS)))
    found.set_tokens("advantages", found.expand_to_tokens(torch.tensor(ADVANTAGES)))
    found.set_sequences("group_ids", torch.tensor([0, 0, 1, 1]))
    current = sides.policy.logprobs(found)
    for name in ("logprobs", "ref_logprobs", "rollout_logprobs"):
        found.set_tokens(name, current + 0.3 * torch.randn(len(current), generator=generator) * found["loss_mask"])
    return found


def trainer_of(kind: str, folder: str, out: Any, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """TRL's trainer of this model."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    common = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }
    extra: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        extra["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(trl, f"{kind}Config")(**common, **settings)
        # transformers would give the folder of a Qwen2 model the pieces of Qwen2's tokenizer, whatever stands there.
        extra["processing_class"] = load_tokenizer(folder)
        return getattr(trl, f"{kind}Trainer")(model=folder, args=config, train_dataset=Dataset.from_list(rows), **extra)


def rollout_trainer(kind: str, sides: Sides, out: Any) -> Any:
    made = trainer_of(
        kind,
        sides.folder,
        out,
        [{"prompt": "1+1="}] * 4,
        num_generations=2,
        max_completion_length=LONGEST,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
    )
    made.current_gradient_accumulation_steps = 1
    return made


@pytest.fixture(scope="module")
def grpo_trainer(sides, tmp_path_factory):
    return rollout_trainer("GRPO", sides, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def rloo_trainer(sides, tmp_path_factory):
    return rollout_trainer("RLOO", sides, tmp_path_factory.mktemp("rloo"))


def padded(batch: BatchedDataDict) -> dict[str, torch.Tensor]:
    """What TRL's trainers read: prompts padded on the left, completions on the right."""
    inputs = {
        "prompt_ids": torch.zeros(4, max(PROMPTS), dtype=torch.int64),
        "completion_ids": torch.zeros(4, max(RESPONSES), dtype=torch.int64),
    }
    masks = {name.replace("ids", "mask"): torch.zeros_like(value) for name, value in inputs.items()}
    fields = {"logprobs": "old_per_token_logps", "ref_logprobs": "ref_per_token_logps", "rollout_logprobs": "rollout"}
    inputs |= masks | {theirs: torch.zeros(4, max(RESPONSES)) for theirs in fields.values()}
    for row, (ids, prompt) in enumerate(zip(batch.unpack("input_ids"), PROMPTS, strict=True)):
        inputs["prompt_ids"][row, -prompt:], inputs["prompt_mask"][row, -prompt:] = ids[:prompt], 1
        num = len(ids) - prompt
        inputs["completion_ids"][row, :num], inputs["completion_mask"][row, :num] = ids[prompt:], 1
        for ours, theirs in fields.items():
            inputs[theirs][row, :num] = batch.unpack(ours)[row][prompt:]
    return inputs | {"advantages": torch.tensor(ADVANTAGES), "num_items_in_batch": batch["loss_mask"].sum()}


def backward(trainer: Any, loss: torch.Tensor) -> tuple[float, float]:
    """Loss and gradient norm of TRL's model."""
    trainer.model.zero_grad()
    loss.backward()
    grads = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), float(torch.stack(grads).norm())


def grpo_loss(trainer: Any, batch: BatchedDataDict, **settings: Any) -> tuple[float, float]:
    found = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "high": 0.28, "delta": None}
    found |= {"tis": None, "bias_correction": False, **settings}
    trainer.loss_type, trainer.importance_sampling_level = found["loss_type"], found["importance_sampling_level"]
    trainer.beta, trainer.epsilon_high, trainer.args.delta = found["beta"], found["high"], found["delta"]
    trainer.args.use_bias_correction_kl, trainer.args.steps_per_generation = found["bias_correction"], 1
    inputs = padded(batch)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = found["tis"] is not None
    if found["tis"] is not None:
        trainer.vllm_importance_sampling_mode = "token_truncate"
        ratio = (inputs["old_per_token_logps"] - inputs["rollout"]).exp()
        inputs["importance_sampling_ratio"] = ratio.clamp(max=found["tis"])
    return backward(trainer, trainer._compute_loss(trainer.model, inputs))


def our_step(sides: Sides, batch: BatchedDataDict, loss: str, *, budget: int = 1000, **options: Any) -> Any:
    """Loss and gradient norm of a step by the core and the training backend."""
    component = get_registry().resolve("losses", loss).load()
    sides.policy.token_budget = budget
    metrics = sides.policy.train_step(batch, component(component.config_class(**options)))
    return metrics["loss"], metrics["grad_norm"]


def same(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    assert ours[0] == approx(theirs[0], rel=1e-5, abs=1e-6)
    assert ours[1] == approx(theirs[1], rel=1e-4)
    assert theirs[1] > 1e-2


CASES = {
    "dapo": ("clipped_pg", {}, {"loss_type": "dapo"}),
    "bnpo": ("clipped_pg", {}, {"loss_type": "bnpo"}),
    "grpo": ("clipped_pg", {"aggregation": "sequence"}, {"loss_type": "grpo"}),
    "dr_grpo": ("dr_grpo", {"constant_length": LONGEST}, {"loss_type": "dr_grpo"}),
    "dual_clip": ("clipped_pg", {"ratio_clip_c": 1.6}, {"delta": 1.6}),
    "tis": ("clipped_pg", {"correction": "tis", "correction_max": 1.1}, {"tis": 1.1}),
    "gspo": ("gspo", {"ratio_clip_min": 0.2}, {"loss_type": "grpo", **SEQUENCE}),
    "gspo_token_mean": ("gspo", {"ratio_clip_min": 0.2, "aggregation": "token"}, {"loss_type": "dapo", **SEQUENCE}),
    # TRL's bound is the ratio itself, ours the distance from 1
    "cispo": ("cispo", {"ratio_clip_max": 0.1}, {"loss_type": "cispo", "high": 1.1}),
}


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_every_loss_type_of_grpo_that_both_have(sides, batch, grpo_trainer, case, beta):
    loss, options, settings = CASES[case]
    clip = {} if loss == "cispo" else {"ratio_clip_max": 0.28}
    theirs = grpo_loss(grpo_trainer, batch, beta=beta, **settings)
    ours = {**clip, "reference_kl_beta": beta, "reference_kl_gradient": "direct", **options}
    same(our_step(sides, batch, loss, **ours), theirs)
    same(our_step(sides, batch, loss, budget=12, **ours), theirs)  # in three micro-batches


def test_the_kl_of_the_default_has_another_gradient(sides, batch, grpo_trainer):
    """TRL differentiates the estimator k3; our default the expectation: equal in value, another gradient."""
    theirs = grpo_loss(grpo_trainer, batch, beta=2.0)
    ours = our_step(sides, batch, "clipped_pg", ratio_clip_max=0.28, reference_kl_beta=2.0)
    assert ours[0] == approx(theirs[0], rel=1e-5)
    assert ours[1] / theirs[1] == approx(1.026, abs=0.005)
    corrected = grpo_loss(grpo_trainer, batch, beta=0.5, bias_correction=True)
    options = {"ratio_clip_max": 0.28, "reference_kl_beta": 0.5, "reference_kl_gradient": "importance"}
    # TRL weighs by the policy at the start of the step, we by the one that sampled.
    sampled = batch.select(range(4))
    sampled.set_tokens("rollout_logprobs", batch["logprobs"])
    same(our_step(sides, sampled, "clipped_pg", **options), corrected)


def test_rloo(sides, batch, rloo_trainer):
    """Off policy TRL's loss is that of a clipped ratio of whole responses."""
    near = batch.select(range(4))
    near.set_tokens("logprobs", sides.policy.logprobs(batch) + 0.02 * (batch["rollout_logprobs"] - batch["logprobs"]))
    inputs = padded(near)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    theirs = backward(rloo_trainer, rloo_trainer._compute_loss(rloo_trainer.model, inputs))
    options = {"length_normalized": False, "aggregation": "sequence", "ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
    same(our_step(sides, near, "gspo", **options), theirs)


def test_rloo_on_policy_is_reinforce(sides, batch, rloo_trainer):
    """The gradient is the same; the value differs, as TRL's is -mean(A) and ours -mean(A * logprob)."""
    current = batch.select(range(4))
    logprobs = sides.policy.logprobs(batch)
    current.set_tokens("logprobs", logprobs)
    inputs = padded(current)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    theirs = backward(rloo_trainer, rloo_trainer._compute_loss(rloo_trainer.model, inputs))
    ours = our_step(sides, current, "reinforce")
    assert ours[1] == approx(theirs[1], rel=1e-4)
    assert theirs[0] == approx(-sum(ADVANTAGES) / 4, rel=1e-4)
    weighted = batch.sum_per_sequence(logprobs * batch["loss_mask"]) * torch.tensor(ADVANTAGES)
    assert ours[0] == approx(-weighted.mean().item(), rel=1e-5)


def test_sft(sides, tmp_path):
    """Rows through TRL's own tokenisation and loss, and through ours; without packing, which TRL has for GPUs only."""
    from nemo_rl_core.data.encoding import ConversationEncoder

    texts = [("1+1=", "2"), ("say it:", "a longer answer"), ("?", "no"), ("12*3=", "36")]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in texts]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    data = [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    trainer = trainer_of("SFT", sides.folder, tmp_path, data, max_length=64, completion_only_loss=True)
    theirs_in = next(iter(trainer.get_train_dataloader()))
    theirs = backward(trainer, trainer.compute_loss(trainer.model, dict(theirs_in)))
    ours_in = ConversationEncoder(load_tokenizer(MODEL), max_length=64).batch(chats)
    trained = theirs_in["labels"] != -100
    assert int(ours_in["loss_mask"].sum()) == int(trained[:, 1:].sum())
    same(our_step(sides, ours_in, "nll"), theirs)
    same(our_step(sides, ours_in, "nll", budget=15), theirs)
