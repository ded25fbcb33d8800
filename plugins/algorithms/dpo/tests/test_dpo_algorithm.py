"""What is trained of a row, the reference, the KL estimate, and a run that learns."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pytest import approx

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext
from nemo_rl_core.registry import get_registry
from nemo_rl_plugins_dpo.algorithm import DPO
from nemo_rl_plugins_dpo.config import DPOConfig
from nemo_rl_plugins_dpo.trainer import DPOTrainer

ROW = {"prompt": "1+1=", "chosen": "2", "rejected": "three"}


def make(*, max_sequence_length=64, **fields):
    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    config = finalize(load_config({"algorithm": "dpo", "model": "scratch:qwen2-tiny", **fields}))
    assert type(config) is DPOConfig
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    return DPO(config, AlgorithmContext(tokenizer=tokenizer, resolve=resolve, max_sequence_length=max_sequence_length))


def shown(algorithm, batch):
    """Each sequence as text, what is trained of it in braces."""
    decode = algorithm.context.tokenizer.decode
    texts = []
    for ids, mask in zip(batch.unpack("input_ids"), batch.unpack("loss_mask"), strict=True):
        first = int(mask.nonzero()[0]) if mask.any() else len(ids)
        assert bool(mask[first:].all())
        trained = "{" + decode(ids[first:].tolist()) + "}" if mask.any() else ""
        texts.append(decode(ids[:first].tolist()) + trained)
    return texts


def test_it_is_an_algorithm():
    assert isinstance(make(), Algorithm)
    assert DPOConfig(batch_size=7).num_items_per_step == 7


def test_a_pair_is_two_sequences_of_one_group():
    algorithm = make()
    batch = algorithm.build_batch([ROW, {**ROW, "prompt": "2"}])
    assert shown(algorithm, batch)[:2] == [
        "<|user|>1+1=<|end|><|assistant|>{2<|end|>}",
        "<|user|>1+1=<|end|><|assistant|>{three<|end|>}",
    ]
    assert batch["group_ids"].tolist() == [0, 0, 1, 1]
    assert batch["is_chosen"].tolist() == [True, False, True, False]


def test_the_last_turn_is_compared_or_every_one():
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = {side: [*talk, {"role": "assistant", "content": text}] for side, text in (("chosen", "d"), ("rejected", "e"))}
    last = make()
    assert shown(last, last.build_batch([row]))[0].endswith("<|user|>c<|end|><|assistant|>{d<|end|>}")
    every = make(train_on="assistant").build_batch([row])
    assert every.sum_per_sequence(every["loss_mask"].long()).tolist() == [4, 4]


def test_a_pair_trains_as_a_whole_or_not_at_all():
    algorithm = make(max_sequence_length=12)
    batch = algorithm.build_batch(
        [ROW, {**ROW, "prompt": "x" * 20}, {"prompt": "1", "chosen": "2", "rejected": "345678901"}]
    )
    trained = batch.sum_per_sequence(batch["loss_mask"].long())
    assert trained.tolist() == [2, 5, 0, 0, 2, 8]  # the second has only its prompt, the others lose their end
    metrics = algorithm.finish_batch(batch)
    assert metrics["untrained_fraction"] == approx(2 / 6)
    assert metrics["truncated_fraction"] == approx(4 / 6)


def test_a_tie_trains_nothing():
    tie = {"prompt": "1+1=", "response1": "2", "response2": "two", "overall_preference": 0}
    batch = make().build_batch([tie, {**tie, "overall_preference": -2}])
    assert batch.sum_per_sequence(batch["loss_mask"].long()).bool().tolist() == [False, False, True, True]
    assert batch["margins"].tolist() == [0.0, 0.0, 2.0, 2.0]
    assert len(make(loss="kto").build_batch([tie, ROW])) == 2


def test_the_loss_decides_whether_there_is_a_reference():
    for loss in ("dpo", "ipo", "dpo_hinge", "cdpo", "robust_dpo", "rpo", "dpo_norm", "kto"):
        assert list(make(loss=loss).models) == ["reference"], loss
        assert make(loss=loss).required_fields == {"ref_logprobs"}, loss
    for loss in ("orpo", "simpo"):
        assert not make(loss=loss).models and not make(loss=loss).required_fields, loss


def test_rows_that_are_no_preference_are_refused():
    with pytest.raises(DataError, match="Example 1 of the batch is no preference: it has `prompt`, `answer`"):
        make().build_batch([ROW, {"prompt": "1", "answer": "2"}])


def test_a_labelled_loss_needs_two_rows():
    with pytest.raises(ConfigError, match="batch_size is 1"):
        make(loss="kto", batch_size=1)


class Counting:
    """Says of each trained token the logprob `per_token` times its id."""

    def __init__(self, per_token):
        self.per_token = per_token

    def logprobs(self, batch):
        return self.per_token * batch["input_ids"] * batch["loss_mask"]


def test_the_kl_is_that_of_answers_to_other_prompts():
    algorithm = make(loss="kto")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(n) * n, "label": n % 2 == 0} for n in (1, 2, 3)]
    batch = algorithm.build_batch(rows)
    ids = batch["input_ids"] * batch["loss_mask"]
    # Each answer is used once, with the prompt after its own: the sum of its ids is that of the batch.
    expected = 0.5 * float(ids.sum()) / 3
    algorithm.fill_batch(batch, {"policy": Counting(-0.5), "reference": Counting(-1.0)})
    assert batch["kl_estimate"].tolist() == approx([expected] * 3)
    assert batch["is_chosen"].tolist() == [False, True, False]
    assert "mismatched" not in batch
    below = algorithm.build_batch(rows)
    algorithm.fill_batch(below, {"policy": Counting(-1.0), "reference": Counting(-0.5)})
    assert below["kl_estimate"].tolist() == [0.0] * 3


def test_a_pair_is_two_answers_with_a_verdict():
    algorithm = make(loss="kto")
    batch = algorithm.build_batch([ROW, {**ROW, "prompt": "4+4=", "chosen": "8"}])
    assert batch["is_chosen"].tolist() == [True, False, True, False]
    prompts = [algorithm.context.tokenizer.decode(ids.tolist()) for ids, _ in batch["mismatched"]]
    assert prompts[0] == "<|user|>1+1=<|end|><|assistant|>8<|end|>"


# -- runs ----------------------------------------------------------------------------------------------------


def digits(rng, *, even):
    return "".join(rng.choice("02468" if even else "13579") for _ in range(rng.randint(2, 6)))


def even_pairs(count, seed):
    """The preference: even digits."""
    rng = random.Random(seed)
    return [
        {"prompt": f"{rng.randrange(1000)}?", "chosen": digits(rng, even=True), "rejected": digits(rng, even=False)}
        for _ in range(count)
    ]


def learn(tmp_path, *, seed=0, steps=12, loss="dpo", **options):
    torch.set_num_threads(1)
    trainer = DPOTrainer(
        {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 3e-3,
            "batch_size": 16,
            "max_steps": steps,
            "seed": seed,
            "run_dir": str(tmp_path / f"run{seed}"),
            "loss": {"name": loss, "options": options},
            "policy": {"max_sequence_length": 32},
            "validation": {"every": steps, "at_start": True},
            "checkpointing": {"enabled": False, "export_model": False},
            "logging": {"progress": "none"},
            "cluster": {"device": "cpu"},
        }
    )
    return trainer.fit(even_pairs(200, seed), validation_dataset=even_pairs(64, 1000 + seed)).history


def test_the_first_loss_is_ln_2_and_held_out_preferences_are_learned(tmp_path):
    history = learn(tmp_path)
    assert history[0]["validation/loss"] == approx(math.log(2), abs=1e-6)
    assert history[1]["train/loss"] == approx(math.log(2), abs=1e-6)
    assert history[1]["train/rewards/margins"] == approx(0.0, abs=1e-6)
    assert history[-1]["validation/rewards/accuracies"] > 0.9
    assert history[-1]["validation/loss"] < 0.6
