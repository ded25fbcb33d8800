"""The same loss and gradient norm as TRL's trainers on equal weights and batches (skipped where TRL is not installed).

TRL tokenises the rows and runs its own loss on its own batch; we run ours on the rows, with the logprobs of the same
model. So tokens and masks are compared as well. TRL's losses that we lack: exo_pair, nca_pair, bco_pair, sppo_hard,
aot, apo, discopop. It has no conservative DPO (its `label_smoothing` is read by other losses).
"""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from pytest import approx

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.registry import get_registry
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_dpo.algorithm import DPO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL = "scratch:qwen2-tiny"
BETA = 0.3


def chat(text, role="user"):
    return [{"role": role, "content": text}]


def rows(*, equal_lengths=False):
    """Pairs of answers of unequal length, unless asked otherwise."""
    answers = [("8", "nine!"), ("a longer one", "no"), ("1", "2"), ("hm", "this is it")]
    if equal_lengths:
        answers = [("abc", "de"), ("fgh", "i"), ("jkl", "mn"), ("opq", "rst")]
    return [
        {"prompt": chat(f"{n}?" * (n + 1)), "chosen": chat(good, "assistant"), "rejected": chat(bad, "assistant")}
        for n, (good, bad) in enumerate(answers)
    ]


def labelled_rows():
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": n % 3 != 0}
        for n, row in enumerate(rows())
    ]


def small_model(seed):
    """Weights large enough that the losses are away from their symmetric points."""
    model = load_model(MODEL, dtype=torch.float32, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


class Running:
    """A `Model` by the plain forward pass of transformers."""

    def __init__(self, model):
        self.model = model

    def with_gradient(self, batch):
        parts = []
        for ids, mask in zip(batch.unpack("input_ids"), batch.unpack("loss_mask"), strict=True):
            scores = self.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            found = scores[:-1].gather(-1, ids[1:, None]).squeeze(-1)
            parts.append(torch.cat([found.new_zeros(1), found]) * mask)
        return torch.cat(parts)

    def logprobs(self, batch):
        with torch.no_grad():
            return self.with_gradient(batch)


def norm(model):
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def ours(loss, options, data, model, reference):
    """Value, gradient norm and batch of our loss."""

    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    config = finalize(load_config({"algorithm": "dpo", "model": MODEL, "loss": {"name": loss, "options": options}}))
    context = AlgorithmContext(tokenizer=load_tokenizer(MODEL), resolve=resolve, max_sequence_length=256)
    algorithm = DPO(config, context)
    batch = algorithm.build_batch(data)
    algorithm.fill_batch(batch, {"policy": Running(model), "reference": Running(reference)})
    model.zero_grad()
    outputs = ModelOutputs(logprobs=Running(model).with_gradient(batch))
    total = NormalizedLoss(algorithm.loss, count_trained(batch))(outputs, batch).total
    total.backward()
    return total.item(), norm(model), batch


SETTINGS = {
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "max_length": 256,
}


def trainer_of(kind, folder, data, **settings):
    """TRL's trainer, and the batch that its loader gives."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    if kind in ("ORPO", "CPO"):
        trl = importlib.import_module(f"trl.experimental.{kind.lower()}")
    tokenizer = load_tokenizer(MODEL)
    models = {"model": small_model(0)}
    if kind in ("DPO", "KTO"):
        models["ref_model"] = small_model(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = getattr(trl, f"{kind}Config")(output_dir=str(folder), **SETTINGS, **settings)
        trainer = getattr(trl, f"{kind}Trainer")(
            **models, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        trainer.args.dataloader_num_workers = 0
        batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    return trainer, batch


def theirs(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(batch))
    loss.backward()
    return loss.item(), norm(trainer.model)


def trained_of(ids, mask):
    """The sequences of a padded batch with what is trained, as a set."""
    return {
        (tuple(row[: int(seen.nonzero().max()) + 1].tolist()), int(seen.sum()))
        for row, seen in zip(ids, mask.bool(), strict=True)
    }


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    return trainer_of("DPO", tmp_path_factory.mktemp("dpo"), rows(), beta=BETA)


def same(mine, other):
    assert mine[0] == approx(other[0], abs=1e-5)
    assert mine[1] == approx(other[1], rel=1e-4)
    assert other[1] > 1e-3


@pytest.mark.parametrize(
    ("loss", "options", "loss_type"),
    [
        ("dpo", {}, "sigmoid"),
        ("ipo", {}, "ipo"),
        ("dpo_hinge", {}, "hinge"),
        ("robust_dpo", {"label_smoothing": 0.2}, "robust"),
        ("dpo_norm", {}, "sigmoid_norm"),
    ],
)
def test_dpo(dpo_trainer, loss, options, loss_type):
    trainer, batch = dpo_trainer
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer.label_smoothing = options.get("label_smoothing", 0.0)
    other = theirs(trainer, batch)
    mine = ours(loss, {"beta": BETA, **options}, rows(), trainer.model, trainer.ref_model)
    same(mine, other)
    own = mine[2]
    padded = own.padded("input_ids"), own.padded("loss_mask")
    assert trained_of(*padded) == trained_of(batch["input_ids"], batch["completion_mask"])


@pytest.mark.parametrize("equal_lengths", [True, False])
def test_rpo(tmp_path, equal_lengths):
    """The likelihood: ours is the mean over pairs of means over tokens, theirs the mean over the batch's tokens."""
    data = rows(equal_lengths=equal_lengths)
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
    trainer, batch = trainer_of("DPO", tmp_path, data, beta=BETA, **settings)
    other = theirs(trainer, batch)
    mine = ours("rpo", {"beta": BETA}, data, trainer.model, trainer.ref_model)
    if equal_lengths:
        same(mine, other)
    else:
        assert 1e-3 < abs(mine[0] - other[0]) < 0.5


def test_kto(tmp_path):
    data = labelled_rows()
    settings = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    trainer, batch = trainer_of("KTO", tmp_path, data, beta=BETA, **settings)
    # Both mismatch by the order of the rows: theirs before the loader shuffles them.
    other = theirs(trainer, batch)
    options = {"beta": BETA, **settings}
    same(ours("kto", options, data, trainer.model, trainer.ref_model), other)


def test_simpo(tmp_path):
    data = rows()
    settings = {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0, "beta": 2.0}
    trainer, batch = trainer_of("CPO", tmp_path, data, **settings)
    same(ours("simpo", {"gamma": 0.7}, data, trainer.model, trainer.model), theirs(trainer, batch))


def test_orpo(tmp_path):
    """Ours has the likelihood of the answers alone, theirs that of the prompts too, by the mean over all tokens."""
    data = rows()
    trainer, batch = trainer_of("ORPO", tmp_path, data, beta=BETA)
    other = theirs(trainer, batch)
    mine = ours("orpo", {"beta": BETA}, data, trainer.model, trainer.model)
    assert abs(mine[0] - other[0]) == approx(0.028, abs=0.005)  # on 5.0
    # With the answers' likelihood in place of their term, the losses are one.
    trainer.model.zero_grad()
    chosen, rejected, _, _, nll = trainer.concatenated_forward(trainer.model, batch)[:5]
    odds = trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    assert other[0] == approx(float(nll - odds), abs=1e-5)
    (-chosen.mean() - odds).backward()
    same(mine, (float(-chosen.mean() - odds), norm(trainer.model)))
