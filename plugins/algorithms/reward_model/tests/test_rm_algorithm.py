"""What of a row is scored, the margin, and a run that learns."""

from __future__ import annotations

import pytest
from pytest import approx

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import DataError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext
from nemo_rl_core.registry import get_registry
from nemo_rl_plugins_reward_model.algorithm import RewardModel

ROW = {"prompt": "1+1=", "chosen": "2", "rejected": "three"}


def make(*, max_sequence_length=64, **fields):
    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    config = finalize(load_config({"algorithm": "reward_model", "model": "scratch:qwen2-tiny", **fields}))
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    context = AlgorithmContext(tokenizer=tokenizer, resolve=resolve, max_sequence_length=max_sequence_length)
    return RewardModel(config, context)


def test_it_is_an_algorithm_of_a_scalar_head():
    algorithm = make(policy={"max_sequence_length": 64})
    assert isinstance(algorithm, Algorithm)
    assert algorithm.config.policy.head == "scalar"
    assert algorithm.config.policy.max_sequence_length == 64


def test_the_last_token_is_scored():
    batch = make().build_batch([ROW])
    assert [mask.nonzero().tolist() for mask in batch.unpack("loss_mask")] == [
        [[length - 1]] for length in batch.lengths.tolist()
    ]
    decode = load_tokenizer("scratch:qwen2-tiny").decode
    assert [decode(ids.tolist()) for ids in batch.unpack("input_ids")] == [
        "<|user|>1+1=<|end|><|assistant|>2<|end|>",
        "<|user|>1+1=<|end|><|assistant|>three<|end|>",
    ]
    cut = make(max_sequence_length=8).build_batch([ROW])
    assert cut["loss_mask"].nonzero().squeeze(1).tolist() == [7, 15]


def test_margins_are_those_of_the_rows():
    algorithm = make(loss={"name": "bradley_terry", "options": {"margin_weight": 1.0}})
    ranked = {
        "prompt": "1+1=",
        "completions": [{"rank": 3, "completion": "9"}, {"rank": 0, "completion": "2"}, {"rank": 1, "completion": "3"}],
    }
    assert algorithm.build_batch([ranked, {**ROW, "margin": 0.5}])["margins"].tolist() == [3.0, 3.0, 0.5, 0.5]
    with pytest.raises(DataError, match="Example 1 of the batch does not say how much"):
        algorithm.build_batch([ranked, ROW])


# -- runs ----------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_told_apart(tmp_path, train_on_lengths):
    history = train_on_lengths(tmp_path, center_coefficient=0.01).history
    assert history[0]["validation/accuracy"] < 0.8
    assert history[-1]["validation/accuracy"] > 0.9
    assert history[-1]["validation/loss"] < history[0]["validation/loss"] - 0.2
    assert history[-1]["train/mean_length"] == approx(10, abs=4)
