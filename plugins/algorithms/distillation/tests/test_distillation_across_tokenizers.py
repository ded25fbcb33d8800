"""What a student samples, read by a teacher with another tokenizer: which tokens are aligned, and learning."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.records.rollout import Rollout, RolloutGroup, Turn
from nemo_rl_core.registry import get_registry
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_distillation.alignment import align
from nemo_rl_plugins_distillation.cross_tokenizer import CrossTokenizerDistillation

torch.set_num_threads(1)


class Pieces:
    """A tokenizer whose tokens are these bytes, whole characters or not; the end of a sequence is token 0."""

    eos_token_id = 0

    def __init__(self, *pieces):
        self.pieces = [b"", *pieces]

    def decode(self, token_ids, **options):
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", errors="replace")


def byte_level():
    """A real byte-level BPE without merges: every byte of a text is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def chunks(ours, our_ids, theirs, their_ids):
    found = align(
        our_ids,
        [True] * len(our_ids),
        their_ids,
        [True] * len(their_ids),
        student_tokenizer=ours,
        teacher_tokenizer=theirs,
    )
    return found.student, found.teacher, found.num_chunks


# -- characters of several bytes ----------------------------------------------------------------------------------


def test_a_character_that_both_split_in_other_places_is_one_chunk():
    """A party popper, F0 9F 8E 89: 1 + 3 bytes on one side, 2 + 2 on the other."""
    ours, theirs = Pieces(b"a", b"\xf0", b"\x9f\x8e\x89", b"b"), Pieces(b"a", b"\xf0\x9f", b"\x8e\x89", b"b")
    assert chunks(ours, [1, 2, 3, 4, 0], theirs, [1, 2, 3, 4, 0]) == ([0, 1, 1, 2, 3], [0, 1, 1, 2, 3], 4)


def test_tokens_that_reach_into_a_character_go_with_it():
    """a C3 | A9 b against a | C3 A9 | b: the first border of both is the end."""
    ours, theirs = Pieces(b"a\xc3", b"\xa9b"), Pieces(b"a", b"\xc3\xa9", b"b")
    assert chunks(ours, [1, 2], theirs, [1, 2, 3]) == ([0, 0], [0, 0, 0], 1)


def test_real_tokenizers_of_bytes_and_of_characters():
    """Two, one, three and four bytes a character."""
    text = "\u00e9a\u20ac\U0001f389"
    ours, theirs = byte_level(), Pieces(*(letter.encode() for letter in text))
    found = chunks(ours, ours(text)["input_ids"], theirs, [1, 2, 3, 4])
    assert found == ([0, 0, 1, 2, 2, 2, 3, 3, 3, 3], [0, 1, 2, 3], 4)


def test_half_a_character_has_no_chunk():
    """The student stops within one; the teacher is asked about U+FFFD, which the student did not say."""
    ours, theirs = Pieces(b"a", b"\xc3"), Pieces(b"a", "\ufffd".encode())
    assert chunks(ours, [1, 2], theirs, [1, 2, 0]) == ([0, -1], [0, -1, -1], 1)


def test_what_follows_half_a_character_is_aligned_again():
    """The token after it goes with it, as the text cannot tell where it ends."""
    ours = Pieces(b"a", b"\xc3", b"b", b"c")
    theirs = Pieces(b"a", "\ufffd".encode(), b"b", b"c")
    assert chunks(ours, [1, 2, 3, 4, 0], theirs, [1, 2, 3, 4, 0]) == ([0, -1, -1, 1, 2], [0, -1, -1, 1, 2], 3)


# -- rollouts -----------------------------------------------------------------------------------------------------


def turn(role, content, ids, sampled):
    message = {"role": role, "content": content}
    return Turn(message=message, token_ids=ids, sampled=sampled, logprobs=[-1.0] * len(ids) if sampled else [])


def test_only_what_was_sampled_is_trained_in_the_teachers_tokens(pairs_tokenizer):
    """An answer in the prompt is not; the two that the student gave are, each aligned with its own."""
    name = pairs_tokenizer.name_or_path
    raw = {"algorithm": "cross_tokenizer_distillation", "model": "scratch:qwen2-tiny", "lmbda": 1.0}
    config = finalize(load_config({**raw, "teacher": {"model_name": "stranger", "tokenizer_name": name}}))
    tokenizer = load_tokenizer("scratch:qwen2-tiny")

    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    made = CrossTokenizerDistillation(
        config, AlgorithmContext(tokenizer=tokenizer, resolve=resolve, max_sequence_length=64)
    )
    end = [tokenizer.eos_token_id]

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    segment = [
        turn("user", "1+1=", ids("1+1="), False),
        turn("assistant", "2", ids("2"), False),
        turn("user", "5+7=", ids("5+7="), False),
        turn("assistant", "12", ids("12") + end, True),
        turn("user", "+30=", ids("+30="), False),
        turn("assistant", "42a", ids("42a") + end, True),
    ]
    rollout = Rollout(rollout_id="a/0", task_id="a", index=0, seed=0, segments=[segment], rewards={"score": 0.0})
    batch = made.build_batch([RolloutGroup(group_id=0, task_id="a", rollouts=[rollout])])
    (theirs,), (mask,) = batch["teacher_input_ids"], batch["teacher_loss_mask"]
    assert made._teacher_tokenizer.decode(theirs[mask]) == "12<eos>42a<eos>"
    assert batch["chunk_ids"][batch["loss_mask"]].tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert batch["teacher_chunk_ids"][0][mask].tolist() == [0, 1, 2, 3, 4]
    assert "rollout_logprobs" in batch


def test_a_student_learns_from_its_own_samples(large_rows, settings, tmp_path, pairs_student, adder):
    """The student has two digits in one token, the teacher one in each; half of the answers' chunks are known anew."""
    config = settings(
        "cross_tokenizer_distillation",
        pairs_student,
        tmp_path,
        teacher={"model_name": str(adder)},
        lmbda=1.0,
        top_k=32,
        batch_size=50,
        max_steps=20,
        generation={"max_new_tokens": 4},
    )
    history = Trainer(config).fit(large_rows).history
    values = [step["train/divergence"] for step in history]
    assert all(step["train/aligned_fraction"] > 0.95 for step in history)
    assert sum(values[-3:]) / 3 < 0.5 * values[0]
    assert "reward/mean" in history[0]


@pytest.fixture
def adder(tmp_path, make_teacher, large_rows):
    """A tiny model of characters that adds digits."""
    return make_teacher("scratch:qwen2-tiny", tmp_path / "adder", rows=large_rows)


@pytest.fixture
def pairs_student(tmp_path, make_pair_model):
    """A scratch model whose tokenizer has two digits in one token."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    return make_pair_model(folder)
