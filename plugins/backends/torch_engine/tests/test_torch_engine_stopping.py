"""End tokens, stop ids and stop strings."""

from __future__ import annotations

import pytest
from torch_engine_kit import complete, request

from nemo_rl_core.models import load_tokenizer
from nemo_rl_plugins_torch_engine.stopping import StopStrings


class Pieces:
    """A tokenizer whose tokens are given pieces of bytes, as byte-level BPE has them."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, token_ids, *, skip_special_tokens=False):
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", errors="replace")


def first_stop(tokenizer, stop, token_ids):
    """Number of tokens at the stop, and which it was; (None, None) if there is none."""
    finder = StopStrings(tokenizer, stop)
    for i in range(1, len(token_ids) + 1):
        found = finder.find(token_ids[:i])
        if found is not None:
            return i, found
    return None, None


@pytest.mark.parametrize(
    ("stop", "tokens", "expected"),
    [
        (("END",), [0, 1, 2], (3, "END")),  # "E" "N" "D": over three tokens
        (("END",), [3, 1, 2], (3, "END")),  # "xE" "N" "D": starts inside a token
        (("END",), [0, 1, 4], (3, "END")),  # "E" "N" "Dyy": ends inside a token
        (("N",), [5], (1, "N")),  # inside one token
        (("END",), [0, 1, 1, 2], (None, None)),
        (("ND", "EN"), [0, 1, 2], (2, "EN")),
        (("ND", "END"), [6], (1, "END")),  # both in one token: the first to end, then by name
        (("é!",), [7, 8, 9], (3, "é!")),  # a character of two tokens
        (("!",), [7, 9], (2, "!")),  # after half a character that stays broken
        (("",), [0, 1], (None, None)),
        (("DE",), [0, 1, 2, 0], (4, "DE")),
    ],
)
def test_stop_strings_are_found_at_the_token_that_completes_them(stop, tokens, expected):
    tokenizer = Pieces(b"E", b"N", b"D", b"xE", b"Dyy", b"aNb", b"xEND", b"\xc3", b"\xa9", b"!")
    assert first_stop(tokenizer, stop, tokens) == expected


def test_a_long_text_is_searched_to_its_end():
    tokenizer = Pieces(b"a", b"b", b"c")
    assert first_stop(tokenizer, ("abca",), [0] * 500 + [1, 2, 0]) == (503, "abca")


def test_stop_strings_end_a_completion_and_are_kept(start):
    engine = start()
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    free = request([5, 6], max_new_tokens=60, seed=4, ignore_eos=True)
    (whole,) = complete(engine, free)
    stop = tokenizer.decode(whole.token_ids[20:23])
    asked = request([5, 6], max_new_tokens=60, seed=4, ignore_eos=True, stop=("zzzzzz", stop))
    stopped, other = complete(engine, asked, free)
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert tokenizer.decode(stopped.token_ids).endswith(stop)
    assert len(stopped.token_ids) <= 23
    assert other.token_ids == whole.token_ids


def test_stop_ids_and_end_tokens(start):
    engine = start()
    (whole,) = complete(engine, request([5, 6], max_new_tokens=400, seed=4, ignore_eos=True))
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    assert 1 in whole.token_ids  # the end token was sampled and ignored
    (ended,) = complete(engine, request([5, 6], max_new_tokens=400, seed=4))
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(1) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", 1)
    stop = next(t for t in whole.token_ids[3:] if t not in whole.token_ids[:3] and t != 1)
    (stopped,) = complete(
        engine, request([5, 6], max_new_tokens=400, seed=4, ignore_eos=True, stop_token_ids=(stop, 103))
    )
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
