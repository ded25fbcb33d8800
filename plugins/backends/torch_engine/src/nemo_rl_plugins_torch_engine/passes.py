"""One pass through the model, as tensors: prompts packed without padding, or one token per row.

Legend: N packed tokens, P prompts, M rows times tokens written to the cache, B rows decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_plugins_torch_engine.cache import KVCache

__all__ = ["DecodePass", "Decoder", "PrefillPass", "Run"]


@frozen
class Run:
    """Neighbouring prompts of equal length in a packed pass, attended as one dense batch."""

    start: int
    count: int
    length: int


@frozen
class PrefillPass:
    """Several different prompts, each written to the cache rows of all requests that have it."""

    token_ids: Tensor
    """[N] prompts one after another."""
    positions: Tensor
    """[N] position of each token in its prompt."""
    last: Tensor
    """[P] index of each prompt's last token."""
    runs: tuple[Run, ...]
    source: Tensor
    """[M] index of the packed token that is written."""
    rows: Tensor
    """[M] cache row it is written to."""
    row_positions: Tensor
    """[M] position in that row."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], device: torch.device) -> PrefillPass:
        """Pack `prompts`; prompt i goes to the cache rows `rows[i]`. Equal lengths are best neighbours."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        runs: list[Run] = []
        source: list[int] = []
        target: list[int] = []
        at: list[int] = []
        for prompt, members in zip(prompts, rows, strict=True):
            start, length = len(tokens), len(prompt)
            tokens.extend(prompt)
            positions.extend(range(length))
            last.append(start + length - 1)
            if runs and runs[-1].length == length:
                runs[-1] = Run(runs[-1].start, runs[-1].count + 1, length)
            else:
                runs.append(Run(start, 1, length))
            for row in members:
                source.extend(range(start, start + length))
                target.extend([row] * length)
                at.extend(range(length))
        index = torch.tensor([tokens, positions], device=device)
        write = torch.tensor([source, target, at], device=device)
        return cls(
            token_ids=index[0],
            positions=index[1],
            last=torch.tensor(last, device=device),
            runs=tuple(runs),
            source=write[0],
            rows=write[1],
            row_positions=write[2],
        )


@frozen
class DecodePass:
    """The next token of rows 0 to B - 1."""

    token_ids: Tensor
    """[B] last token of each row."""
    positions: Tensor
    """[B] its position."""
    rows: Tensor
    """[B] 0 to B - 1."""
    length: int
    """Cache positions looked at: at least the largest position + 1."""


class Decoder(Protocol):
    """Runs the model over a cache that it owns."""

    vocab_size: int

    @property
    def cache(self) -> KVCache:
        """Keys and values of all rows."""
        ...

    def prefill(self, batch: PrefillPass) -> Tensor:
        """Fill the cache; [P, V] logits after the last token of each prompt."""
        ...

    def decode(self, batch: DecodePass) -> Tensor:
        """Add one token to each row's cache; [B, V] logits after it."""
        ...

    def refresh(self) -> int:
        """Called after the model's weights were replaced or changed; bytes of them that it copied."""
        ...
