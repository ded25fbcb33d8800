"""Drawing tokens for all rows of a batch at once. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define
from torch import Tensor

from nemo_rl_plugins_torch_engine.noise import uniforms

if TYPE_CHECKING:
    from nemo_rl_plugins_torch_engine.sequence import Sequence as Sampled

__all__ = ["RowSampling", "sample"]

_NOISE_BLOCK = 64


@define
class RowSampling:
    """Sampling parameters of the rows of a batch, and the random numbers of their next steps."""

    scale: Tensor | None
    """[B, 1] inverse temperature (1 for greedy rows), or None if it is 1 for all."""
    greedy: Tensor | None
    """[B] bool, or None if no row is greedy."""
    all_greedy: bool
    top_k: Tensor | None
    """[B, 1] number of tokens kept, or None if no row limits its tokens by top-k or top-p."""
    top_p: Tensor | None
    """[B, 1]; 2 for no limit, so that rounding can drop nothing."""
    max_top_k: int
    """Largest of `top_k`."""
    noise: Tensor
    """[count, B] uniforms of the next steps."""
    column: int = 0

    @classmethod
    def of(cls, rows: Sequence[Sampled], vocab_size: int, device: torch.device) -> RowSampling:
        """The parameters of `rows` at their present positions."""
        params = [row.request.sampling for row in rows]
        scales = [1.0 / p.temperature if p.temperature > 0 else 1.0 for p in params]
        greedy = [p.temperature == 0 for p in params]
        limited = any(not g and (p.top_k > 0 or p.top_p < 1) for p, g in zip(params, greedy, strict=True))
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 and not g else vocab_size
                 for p, g in zip(params, greedy, strict=True)]  # fmt: skip
        top_p = [p.top_p if p.top_p < 1 and not g else 2.0 for p, g in zip(params, greedy, strict=True)]
        noise = uniforms([row.seed for row in rows], [len(row.token_ids) for row in rows], _NOISE_BLOCK)

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            scale=column(scales, torch.float32) if any(s != 1.0 for s in scales) else None,
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            top_k=column(top_k, torch.int64) if limited else None,
            top_p=column(top_p, torch.float32) if limited else None,
            max_top_k=max(top_k),
            noise=torch.from_numpy(noise).t().contiguous().to(device),
        )

    @property
    def exhausted(self) -> bool:
        """Whether the random numbers are used up and the object must be made again."""
        return self.column >= self.noise.shape[0]

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sample from logits [R, V] with the next random number of each row; returns tokens [R] and logprobs [R]."""
        uniform = self.noise[self.column]
        self.column += 1
        return sample(logits, self, uniform)


def sample(logits: Tensor, rows: RowSampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Departure from the usual exponential race: one random number per row instead of V, so that
    counter-based noise costs nothing for a large vocabulary.

    Args:
        logits: [B, V] any float type; computed on in float32.
        rows: Parameters of the B rows.
        uniform: [B] in [0, 1).

    Returns:
        [B] int64 tokens, and [B] float32 logprobs under the distribution each was drawn from.
    """
    x = logits.float()
    if rows.scale is not None:
        x = x * rows.scale
    if rows.all_greedy:
        top, tokens = x.max(dim=-1)
        return tokens, top - x.logsumexp(dim=-1)
    if rows.top_k is not None:
        tokens, logprobs = _draw_limited(x, rows, uniform)
    else:
        tokens, logprobs = _draw(x, uniform)
    if rows.greedy is not None:
        top, best = x.max(dim=-1)
        tokens = torch.where(rows.greedy, best, tokens)
        logprobs = torch.where(rows.greedy, top - x.logsumexp(dim=-1), logprobs)
    return tokens, logprobs


def _draw(x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens [R] and their logprobs [R] by scaled logits x [R, V] and random numbers [R]."""
    shifted = x - x.amax(dim=-1, keepdim=True)
    cumulative = shifted.exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    tokens = tokens.clamp_(max=x.shape[-1] - 1)  # a non-finite row must not index out of range
    logprobs = shifted.gather(-1, tokens) - total.log()
    return tokens[:, 0], logprobs[:, 0]


def _draw_limited(x: Tensor, rows: RowSampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens [R] and logprobs [R] from the top-k tokens, of these the smallest set that reaches top-p."""
    assert rows.top_k is not None and rows.top_p is not None
    ordered, index = x.topk(rows.max_top_k, dim=-1) if rows.max_top_k < x.shape[-1] else x.sort(-1, descending=True)
    weights = (ordered - ordered[:, :1]).exp()
    rank = torch.arange(weights.shape[-1], device=x.device)
    weights = weights.masked_fill(rank >= rows.top_k, 0.0)
    cumulative = weights.cumsum(dim=-1)
    before = cumulative - weights
    # A token stays if those before it do not reach top-p yet; so the first always stays.
    weights = weights.masked_fill(before >= rows.top_p * cumulative[:, -1:], 0.0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_(max=x.shape[-1] - 1)
    place = place.clamp_(max=weights.shape[-1] - 1)
    logprobs = (weights.gather(-1, place) / total).log()
    return index.gather(-1, place)[:, 0], logprobs[:, 0]
