"""The same loss and gradient norm as TRL's RewardTrainer on equal weights and rows (skipped where it is missing)."""

from __future__ import annotations

import copy
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
from nemo_rl_plugins_reward_model.algorithm import RewardModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL = "scratch:qwen2-tiny"


def rows(*, margin):
    answers = [("8", "nine!"), ("a longer one", "no"), ("1", "2"), ("hm", "this is it")]
    return [
        {
            "prompt": [{"role": "user", "content": f"{n}?" * (n + 1)}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
            **({"margin": 0.5 * n} if margin else {}),
        }
        for n, (good, bad) in enumerate(answers)
    ]


def norm(model):
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def theirs(folder, data, model, coefficient):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.RewardConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            max_length=256,
            center_rewards_coefficient=coefficient,
        )
        trainer = trl.RewardTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=load_tokenizer(MODEL)
        )
        batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(dict(batch)))
    loss.backward()
    return loss.item(), norm(trainer.model), batch


def ours(data, model, options):
    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    loss = {"name": "bradley_terry", "options": options}
    config = finalize(load_config({"algorithm": "reward_model", "model": MODEL, "loss": loss}))
    context = AlgorithmContext(tokenizer=load_tokenizer(MODEL), resolve=resolve, max_sequence_length=256)
    algorithm = RewardModel(config, context)
    batch = algorithm.build_batch(data)
    values = []
    for ids in batch.unpack("input_ids"):
        states = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        values.append(model.score(states).squeeze(-1))
    outputs = ModelOutputs(values=torch.cat(values))
    total = NormalizedLoss(algorithm.loss, count_trained(batch))(outputs, batch).total
    total.backward()
    return total.item(), norm(model), batch


@pytest.mark.parametrize("coefficient", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_gradient(tmp_path, margin, coefficient):
    data = rows(margin=margin)
    model = load_model(MODEL, dtype=torch.float32, head="scalar").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.config.pad_token_id = load_tokenizer(MODEL).pad_token_id
    other = theirs(tmp_path, data, model, coefficient)
    model.zero_grad()
    mine = ours(data, model, {"margin_weight": float(margin), "center_coefficient": coefficient or 0.0})
    assert mine[0] == approx(other[0], abs=1e-5)
    assert mine[1] == approx(other[1], rel=1e-4)
    padded = zip(other[2]["input_ids"], other[2]["attention_mask"], strict=True)
    seen = {tuple(ids[mask.bool()].tolist()) for ids, mask in padded}
    assert {tuple(ids.tolist()) for ids in mine[2].unpack("input_ids")} == seen
