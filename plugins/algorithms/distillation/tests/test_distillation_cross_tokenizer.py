"""Another tokenizer: alignment, projection and both losses, by hand; and learning."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_distillation.alignment import align, token_ends
from nemo_rl_plugins_distillation.chunks import NEVER, likeliest_of_chunks
from nemo_rl_plugins_distillation.comparison import ByProjection, ByRank
from nemo_rl_plugins_distillation.loss_config import ProjectedKLConfig, SortedProbabilitiesConfig
from nemo_rl_plugins_distillation.projected_kl import ProjectedKLLoss
from nemo_rl_plugins_distillation.sorted_probabilities import SortedProbabilitiesLoss
from nemo_rl_plugins_distillation.vocabulary import Projection, match_texts, token_texts

torch.set_num_threads(1)
LOG = math.log


@pytest.fixture(scope="module")
def chars():
    return load_tokenizer("scratch:qwen2-tiny")


class Bytes:
    """A tokenizer of bytes, of which a letter with an accent needs two."""

    eos_token_id = 256

    def decode(self, token_ids, **options):
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")

    def encode(self, text):
        return list(text.encode("utf-8"))


class Words:
    """A tokenizer of words that drops the space at the beginning of what it decodes, as SentencePiece does."""

    eos_token_id = 0

    def __init__(self, words):
        self.words = ["", *words]

    def decode(self, token_ids, **options):
        return "".join(self.words[i] for i in token_ids).removeprefix(" ")


# -- alignment ----------------------------------------------------------------------------------------------------


def chunks_of(ours, our_ids, theirs, their_ids, our_mask=None, their_mask=None):
    found = align(
        our_ids,
        our_mask or [True] * len(our_ids),
        their_ids,
        their_mask or [True] * len(their_ids),
        student_tokenizer=ours,
        teacher_tokenizer=theirs,
    )
    return found.student, found.teacher, found.num_chunks


def test_ends_of_tokens():
    """Both bytes of an accented letter end where it does; a leading space is no letter of the first token."""
    assert token_ends(Bytes(), Bytes().encode("a\u00e9b")) == ("a\u00e9b", [1, 2, 2, 3])
    assert token_ends(Words([" the", " cat", "s"]), [1, 2, 3]) == ("the cats", [3, 7, 8])
    assert token_ends(Bytes(), []) == ("", [])


def test_chunks_by_hand():
    """the cats: bytes against `the`, ` cat`, `s`; the end tokens are a chunk of their own."""
    student = [*Bytes().encode("the cats"), 256]
    found = chunks_of(Bytes(), student, Words([" the", " cat", "s"]), [1, 2, 3, 0])
    assert found == ([0, 0, 0, 1, 1, 1, 1, 2, 3], [0, 1, 2, 3], 4)


def test_tokens_that_overlap_are_one_chunk():
    """`ab c` + `d` against `ab` + ` cd`: the borders meet only at the end."""
    assert chunks_of(Words(["ab c", "d"]), [1, 2], Words(["ab", " cd"]), [1, 2]) == ([0, 0], [0, 0], 1)


def test_what_follows_a_difference_has_no_chunk():
    ours, theirs = Words(["ab", "cd", "e"]), Words(["ab", "cx", "e"])
    assert chunks_of(ours, [1, 2, 3, 0], theirs, [1, 2, 3, 0]) == ([0, -1, -1, -1], [0, -1, -1, -1], 1)


def test_a_side_that_was_cut_off():
    """The student's text ends before the teacher's; its end token is missing."""
    words = Words(["ab", "cd", "e"])
    assert chunks_of(words, [1, 2], words, [1, 2, 3, 0]) == ([0, 1], [0, 1, -1, -1], 2)


def test_turns_are_aligned_one_by_one():
    """Prompts between them may differ; white space at the beginning of a turn may too."""
    ours, theirs = Words(["user", "yes", " no"]), Words(["<someone>", " yes", "no"])
    found = chunks_of(
        ours, [1, 2, 0, 1, 3, 0], theirs, [1, 1, 2, 0, 1, 3, 0],
        [False, True, True, False, True, True], [False, False, True, True, False, True, True],
    )  # fmt: skip
    assert found == ([-1, 0, 1, -1, 2, 3], [-1, -1, 0, 1, -1, 2, 3], 4)


def test_nothing_to_align(chars):
    assert chunks_of(chars, [], chars, []) == ([], [], 0)


# -- vocabularies -------------------------------------------------------------------------------------------------


def test_texts_of_tokens(chars, pairs_tokenizer):
    texts = token_texts(pairs_tokenizer)
    assert texts[pairs_tokenizer.eos_token_id] is None
    assert {"a", " ", "7", "42"} <= set(texts)
    assert token_texts(chars)[chars.encode("7", add_special_tokens=False)[0]] == "7"


def test_matches(chars, pairs_tokenizer):
    matched, has = match_texts(chars, pairs_tokenizer)
    (seven,), (pair,) = (pairs_tokenizer.encode(text) for text in ("7", "42"))
    (ours,) = chars.encode("7", add_special_tokens=False)
    assert (int(matched[seven]), int(matched[pair])) == (ours, -1)
    assert has[ours]
    assert int(matched[pairs_tokenizer.eos_token_id]) == chars.eos_token_id


def test_a_projection_by_text(chars, pairs_tokenizer):
    """Pairs onto characters: 42 is half 4, half 2. Each row sums to 1."""
    made = Projection.by_text(pairs_tokenizer, chars)
    (pair,) = pairs_tokenizer.encode("42")
    four, two = (chars.encode(text, add_special_tokens=False)[0] for text in "42")
    mine = made.student_ids == pair
    assert dict(zip(made.teacher_ids[mine].tolist(), made.weights[mine].tolist(), strict=True)) == {four: 0.5, two: 0.5}
    rows = torch.zeros(len(pairs_tokenizer)).index_add(0, made.student_ids, made.weights)
    assert set(rows.tolist()) == {1.0}


def test_preimages():
    """The largest weights first; a column with fewer is filled with weight 0."""
    made = Projection(torch.tensor([5, 6, 7, 5]), torch.tensor([0, 0, 0, 2]), torch.tensor([0.2, 1.0, 0.5, 0.8]), 3)
    ids, weights = made.preimages(2)
    assert ids.tolist() == [[6, 7], [0, 0], [5, 0]]
    assert weights.tolist() == [[1.0, 0.5], [0.0, 0.0], [approx(0.8), 0.0]]


def test_a_projection_in_a_file(tmp_path):
    made = Projection(torch.tensor([1, 2]), torch.tensor([0, 3]), torch.tensor([1.0, 0.5]), 4)
    made.save(tmp_path / "m.safetensors")
    again = Projection.load(tmp_path / "m.safetensors", num_teacher_ids=4)
    assert torch.equal(again.weights, made.weights)
    with pytest.raises(ConfigError, match="teacher ids up to 3 of 3"):
        Projection.load(tmp_path / "m.safetensors", num_teacher_ids=3)
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be read"):
        Projection.load(tmp_path / "nowhere.safetensors", num_teacher_ids=3)


def test_the_mean_distribution_of_a_chunk():
    """Two positions of chunk 0: 3 has (0.6 + 0.2) / 2, 1 has 0.3 / 2, 4 has 0.5 / 2; two are kept."""
    ids, mass = likeliest_of_chunks(
        torch.tensor([[3, 1], [4, 3], [2, 9]]),
        torch.tensor([[0.6, 0.3], [0.5, 0.2], [0.7, 0.1]]),
        torch.tensor([0, 0, 1]),
        torch.tensor([2, 1]),
    )
    assert ids.tolist() == [[3, 4], [2, 9]]
    torch.testing.assert_close(mass, torch.tensor([[0.4, 0.25], [0.7, 0.1]]))


# -- losses by hand -----------------------------------------------------------------------------------------------


def a_batch(chunk_ids, **tokens):
    n = len(chunk_ids)
    mask = torch.tensor([False] + [True] * (n - 1))
    return BatchedDataDict([n], {"loss_mask": mask, "chunk_ids": torch.tensor(chunk_ids), **tokens})


def test_projected_kl_by_hand():
    """Two tokens of the student in one chunk, two columns of the teacher with one and two preimages.

    Column 0 has p = 0.4 and 0.2, mean 0.3; column 1 has 0.2 + 0.5 * 0.4 = 0.4 and 0.4 + 0.5 * 0.4 = 0.6, mean 0.5.
    Within the two: 3/8 and 5/8; the teacher has 3/4, 1/4. The chunk counts twice, the third token has none.
    """
    p = torch.tensor([[0.4, 0.2, 0.4], [0.2, 0.4, 0.4], [0.9, 0.05, 0.05]], dtype=torch.float64)
    log_p = torch.cat([torch.zeros(1, 3, dtype=torch.float64), p.log()]).requires_grad_()
    ids = torch.tensor([[[0, 0], [1, 2]]]).expand(4, 2, 2)
    data = a_batch(
        [-1, 0, 0, -1],
        top_ids=ids,
        projection_weights=torch.tensor([[[1.0, 0.0], [1.0, 0.5]]]).expand(4, 2, 2),
        teacher_top_logprobs=torch.tensor([[0.6, 0.2]], dtype=torch.float64).log().expand(4, 2),
    )
    outputs = ModelOutputs(top_logprobs=log_p.gather(1, ids.flatten(1)).view(4, 2, 2), logprobs=log_p[:, 0])
    forward = 0.75 * LOG(0.75 / 0.375) + 0.25 * LOG(0.25 / 0.625)
    reverse = 0.375 * LOG(0.375 / 0.75) + 0.625 * LOG(0.625 / 0.25)
    sums = ProjectedKLLoss()(outputs, data)
    assert sums.total.item() == approx(2 * forward)
    assert sums.metrics["aligned_fraction"].total.item() / 3 == approx(2 / 3)
    mixed = ProjectedKLLoss(ProjectedKLConfig(forward_weight=0.25))(outputs, data)
    assert mixed.total.item() == approx(2 * (0.25 * forward + 0.75 * reverse))
    bucket = ProjectedKLLoss(ProjectedKLConfig(tail="bucket"))(outputs, data)
    assert bucket.total.item() == approx(2 * (0.6 * LOG(0.6 / 0.3) + 0.2 * LOG(0.2 / 0.5)), abs=1e-6)
    with_nll = ProjectedKLLoss(ProjectedKLConfig(nll_weight=0.1))(outputs, data)
    assert with_nll.total.item() == approx(2 * forward - 0.1 * LOG(0.4 * 0.2 * 0.9))
    # d/d log p of column 0 at the first token: -2 * 0.75 * (0.4 / 2 / 0.3) + 2 * (0.4 / 2) / 0.8
    (grad,) = torch.autograd.grad(sums.total, log_p)
    assert (grad[1, 0]).item() == approx(-2 * 0.75 * (0.2 / 0.3) + 2 * 0.2 / 0.8)
    assert not grad[3].any()


def test_sorted_probabilities_by_hand():
    """Matched: teacher 0.5 against 0.4, the rest 0.5 against 0.6. By rank: 0.3, 0.1 against 0.2, 0.15."""
    p = torch.tensor([[0.4, 0.15, 0.2, 0.25]], dtype=torch.float64)
    log_p = torch.cat([torch.zeros(1, 4, dtype=torch.float64), p.log()]).requires_grad_()
    ids = torch.tensor([[[0, 0], [2, 1]]]).expand(2, 2, 2)
    data = a_batch(
        [-1, 0],
        top_ids=ids,
        teacher_top_logprobs=torch.tensor([[LOG(0.5), NEVER]], dtype=torch.float64).expand(2, 2),
        teacher_sorted=torch.tensor([[0.3, 0.1]], dtype=torch.float64).expand(2, 2),
        student_unmatched=torch.ones(2, 2, dtype=torch.bool),
    )
    outputs = ModelOutputs(top_logprobs=log_p.gather(1, ids.flatten(1)).view(2, 2, 2))
    matched = 0.5 * LOG(0.5 / 0.4) + 0.5 * LOG(0.5 / 0.6)
    total = SortedProbabilitiesLoss()(outputs, data).total
    assert total.item() == approx(matched + 0.1 + 0.05)
    (grad,) = torch.autograd.grad(total, log_p)
    # -0.5 + 0.5 * 0.4 / 0.6 at the matched token; raise 0.2 (sign -1), lower 0.15 (sign +1), each times its p
    assert grad[1].tolist() == approx([-0.5 + 0.5 * 0.4 / 0.6, 0.15, -0.2, 0.0])
    weighed = SortedProbabilitiesLoss(SortedProbabilitiesConfig(matched_weight=2.0, sorted_weight=0.5))(outputs, data)
    assert weighed.total.item() == approx(2 * matched + 0.075)


def test_losses_check_their_shapes():
    data = a_batch([-1, 0], top_ids=torch.zeros(2, 2, 3, dtype=torch.int64), projection_weights=torch.zeros(2, 2, 3))
    outputs = ModelOutputs(top_logprobs=torch.zeros(2, 3))
    for loss in (ProjectedKLLoss(), SortedProbabilitiesLoss()):
        with pytest.raises(ShapeMismatch, match=r"has shape \[2, 3\]"):
            loss(outputs, data)


# -- what the batch gets ------------------------------------------------------------------------------------------


class Student:
    def top_logprobs(self, batch, k):
        return torch.tensor([[1, 3]]).expand(batch.num_tokens, 2), torch.zeros(batch.num_tokens, 2)


def both_batches():
    """Tokens 1 and 2 of the student are chunk 0, token 3 is chunk 1; the teacher has one and two tokens for them."""
    ours = a_batch([-1, 0, 0, 1])
    ours.set_sequences("num_chunks", torch.tensor([2]))
    theirs = BatchedDataDict([4], {"chunk_ids": torch.tensor([-1, 0, 1, 1])})
    ids = torch.tensor([[9, 9], [0, 2], [1, 0], [2, 1]])
    return ours, theirs, ids, torch.tensor([[0.5, 0.5], [0.6, 0.3], [0.8, 0.1], [0.5, 0.2]]).log()


def test_fields_by_projection():
    """Chunk 0: tokens 0 and 2 of the teacher, 2 without a preimage. Chunk 1: the means of 1 and 2 are 0.5 and 0.25."""
    ours, theirs, ids, logprobs = both_batches()
    ByProjection(torch.tensor([[4], [5], [0]]), torch.tensor([[1.0], [0.5], [0.0]])).fill(
        ours, theirs, ids, logprobs, Student()
    )
    assert ours["top_ids"][..., 0].tolist() == [[0, 0], [4, 0], [4, 0], [5, 0]]
    assert ours["projection_weights"][..., 0].tolist() == [[0, 0], [1, 0], [1, 0], [0.5, 0]]
    assert ours["teacher_top_logprobs"][1].tolist() == [approx(LOG(0.6)), NEVER]
    assert ours["teacher_top_logprobs"][3].tolist() == [approx(LOG(0.5)), NEVER]


def test_fields_by_rank():
    """The teacher's 0 is the student's 3; its 1 and 2 have no partner."""
    ours, theirs, ids, logprobs = both_batches()
    has = torch.tensor([False, False, False, True])
    ByRank((torch.tensor([3, -1, -1]), has), top_k=2).fill(ours, theirs, ids, logprobs, Student())
    assert ours["top_ids"][1].tolist() == [[3, 0], [1, 3]]
    assert ours["teacher_top_logprobs"][1].tolist() == [approx(LOG(0.6)), NEVER]
    assert ours["student_unmatched"].tolist() == [[True, False]] * 4
    assert ours["teacher_sorted"][1].tolist() == [approx(0.3), 0.0]
    # positions sorted first, then averaged: (0.8, 0) and (0.5, 0.2)
    assert ours["teacher_sorted"][3].tolist() == approx([0.65, 0.1])


def test_fields_by_rank_alone():
    """Without a match of vocabularies everything is ranked."""
    ours, theirs, ids, logprobs = both_batches()
    ByRank(None, top_k=2).fill(ours, theirs, ids, logprobs, Student())
    assert ours["student_unmatched"].all()
    assert (ours["teacher_top_logprobs"][1:] == NEVER).all()
    assert ours["teacher_sorted"][1].tolist() == approx([0.6, 0.3])


# -- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "metric"), [("projected_kl", "divergence"), ("sorted_probabilities", "matched_kl")])
def test_it_learns_from_a_teacher_with_another_tokenizer(loss, metric, stranger, large_rows, settings, tmp_path):
    config = settings(
        "cross_tokenizer_distillation",
        "scratch:qwen2-tiny",
        tmp_path,
        teacher={"model_name": str(stranger)},
        loss=loss,
        top_k=32,
        batch_size=25,
        max_steps=30,
    )
    history = Trainer(config).fit(large_rows).history
    values = [step[f"train/{metric}"] for step in history]
    assert history[0]["train/aligned_fraction"] == 1.0
    assert sum(values[-3:]) / 3 < 0.5 * values[0]
