"""Teachers made here: tiny models trained on given answers."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.training.trainer import Trainer

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(5) for b in range(5)]
LARGE = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(5, 10) for b in range(5, 10)
]


def small_run(algorithm, model, run_dir, **changes):
    """Settings of a run that takes seconds."""
    settings = {
        "algorithm": algorithm,
        "model": str(model),
        "learning_rate": 1e-2,
        "run_dir": str(run_dir),
        "policy": {"max_sequence_length": 64, "optimizer": {"eps": 1e-5}},
        "logging": {"progress": "none"},
        "cluster": {"device": "cpu"},
        "checkpointing": {"enabled": True},
    }
    return {**settings, **changes}


def trained_teacher(model, run_dir, rows=ROWS, steps=60):
    """The folder of a model trained on the rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = Trainer(small_run("sft", model, run_dir, max_steps=steps, batch_size=25))
    result = trainer.fit(rows)
    torch.set_num_threads(threads)
    return result.model_path


@pytest.fixture
def rows():
    """What the teacher learnt."""
    return ROWS


@pytest.fixture
def large_rows():
    """What the stranger learnt: sums of two digits."""
    return LARGE


@pytest.fixture
def settings():
    """`small_run`."""
    return small_run


@pytest.fixture
def make_teacher():
    """`trained_teacher`."""
    return trained_teacher


@pytest.fixture
def make_pair_model():
    """`pair_model`."""
    return pair_model


@pytest.fixture(scope="session")
def pairs_tokenizer(tmp_path_factory):
    """See `pair_tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = pair_tokenizer(folder)
    made.name_or_path = str(folder)
    return made


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A tiny model that adds digits, with the student's tokenizer."""
    return trained_teacher("scratch:qwen2-tiny", tmp_path_factory.mktemp("teacher"))


def pair_tokenizer(folder, letters="abcdefghijklmnopqrstuvwxyz0123456789+=- "):
    """A tokenizer of characters and of some pairs of digits, in `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [f"{a}{b}" for a in "0123456789" for b in "0123456789"]
    vocabulary = {token: i for i, token in enumerate(["<eos>", *reversed(letters), *pairs])}
    merges = [(pair[0], pair[1]) for pair in pairs]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=None))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]+|."), "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def pair_model(folder):
    """A tiny scratch model with `pair_tokenizer`, as `scratch:<folder>`."""
    import json

    from nemo_rl_core.models import load_model_config

    tokenizer = pair_tokenizer(folder)
    config = load_model_config("scratch:qwen2-tiny").to_dict()
    config.update(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    config.update(bos_token_id=None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"scratch:{folder}"


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """A tiny model that adds digits, whose tokenizer has two digits in one token."""
    model = pair_model(tmp_path_factory.mktemp("pairs"))
    return trained_teacher(model, tmp_path_factory.mktemp("stranger"), rows=LARGE)
