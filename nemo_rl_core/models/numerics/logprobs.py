"""Log-probabilities of given tokens from hidden states, a chunk of tokens at a time.

Legend: M tokens whose logprob is wanted, K tokens in place of each, E hidden size, V vocabulary, C chunk size.

The [M, V] logits never exist: the forward pass keeps one float per token, and the backward pass computes the
logits of each chunk again. Only when all tokens fit into one chunk are its probabilities kept instead.
The gradient of log-softmax is (onehot - softmax), so no autograd graph is built over the vocabulary. The idea is that
of Liger Kernel's fused linear cross entropy (arXiv:2410.10989); unlike there, the gradient is taken in the backward
pass, since a policy loss weighs each token by what is only known then.

Where ranks hold the rows of the output layer in shares (`VocabularyShard`), each computes its share of every chunk, and
only numbers per token pass between them: one exchange in the forward pass, none in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from nemo_rl_core.models.numerics.autograd import AutogradContext
from nemo_rl_core.models.numerics.output_gradients import OutputGradients
from nemo_rl_core.models.numerics.products import fast_linear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LogitTransform", "VocabularyShard", "likeliest", "linear_logprobs", "transformed_logits"]


@frozen(kw_only=True)
class LogitTransform:
    """What stands between the output layer and the softmax: `cap(logits) * scale / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    """`softcap * tanh(logits / softcap)`, before the temperature."""
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform float32 logits [..., V] in place."""
        factor = self.scale
        if self.softcap is not None:
            logits.mul_(self.scale / self.softcap).tanh_()
            factor = self.softcap
        factor /= self.temperature
        return logits if factor == 1.0 else logits.mul_(factor)

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient [M, V] in place with respect to the raw logits, given the transformed ones [M, V]."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            ratio = logits * (self.temperature / self.softcap)
            grad.mul_(1 - ratio.square_())
        return grad if factor == 1.0 else grad.mul_(factor)


@frozen(kw_only=True, eq=False)
class VocabularyShard:
    """This rank's share of an output layer whose rows stand on several ranks, in the order of the ranks.

    Every rank computes the same tokens. The gradient of the hidden states is this rank's share of the sum over ranks.
    """

    start: int
    """Token id of the first row that this rank holds."""
    group: ProcessGroup
    """The `torch.distributed` process group of the ranks."""

    def locate(self, targets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Find the row of each target on this rank, and whether it is here at all.

        Args:
            targets: [M, K] token ids, or any other shape [...].
            num_rows: Number of rows that this rank holds.

        Returns:
            Two tensors in the shape of `targets`: int64 rows (any row for a target that is elsewhere), and bool.
        """
        rows = targets - self.start
        here = (rows >= 0) & (rows < num_rows)
        return rows.clamp(0, num_rows - 1), here

    def gather(self, values: Tensor) -> Tensor:
        """Collect the `values` [...] of every rank, [ranks, ...]."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def merge(self, lse: Tensor, chosen: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the whole vocabulary, given those of the shares.

        Args:
            lse: [M] log-sum-exp of this rank's logits.
            chosen: [M, K] logits of the targets, 0 where another rank has them.
            entropy: [M] of the softmax over this rank's logits, or [0].
        """
        packed = self.gather(torch.cat([lse[:, None], chosen, *([entropy[:, None]] if len(entropy) else [])], dim=1))
        shares = packed[..., 0]
        total = torch.logsumexp(shares, dim=0)
        if len(entropy):
            # A share has the weight exp(lse_r - lse); its tokens are less likely by that factor.
            entropy = ((shares - total).exp() * (packed[..., -1] + total - shares)).sum(0)
        return total, packed[..., 1 : 1 + chosen.shape[1]].sum(0), entropy


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_size: int = 1024,
    with_entropy: bool = False,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-softmax of `hidden @ weight.T` at `targets`, and the entropy of the distribution.

    Both carry gradient. The softmax is computed in float32 whatever the dtype of the weights.

    Args:
        hidden: [M, E] hidden states that predict.
        weight: [V, E] output layer, or this rank's rows of it.
        targets: [M] int64 predicted tokens, or [M, K] several in place of each.
        bias: [V] of the output layer.
        transform: See `LogitTransform`.
        chunk_size: Tokens whose [C, V] float32 logits are held at a time.
        with_entropy: Also return the entropies.
        shard: Says which rows `weight` (and `bias`) are; None is all. A collective of its group then.

    Returns:
        Float32 logprobs in the shape of `targets`, and [M] float32 entropies in nats or None.
    """
    wide = targets if targets.ndim == 2 else targets[:, None]
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, wide, transform or LogitTransform(), chunk_size, with_entropy, shard
    )
    return logprobs.view(targets.shape), entropy if with_entropy else None


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_size: int = 1024,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each distribution, [M, k] int64 ids and float32 logprobs, likeliest first.

    Arguments as of `linear_logprobs`; k is at most V. Carries no gradient.
    """
    num_tokens = hidden.shape[0]
    ids = torch.empty(num_tokens, k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(num_tokens, k, dtype=torch.float32, device=hidden.device)
    for start in range(0, num_tokens, chunk_size):
        rows = slice(start, start + chunk_size)
        logits = transformed_logits(hidden[rows], weight, bias, transform or LogitTransform())
        top = logits.topk(min(k, logits.shape[1]), dim=-1)
        lse = torch.logsumexp(logits, dim=-1)
        if shard is None:
            ids[rows], logprobs[rows] = top.indices, top.values - lse[:, None]
        else:
            ids[rows], logprobs[rows] = _likeliest_of_all(shard, k, top.indices + shard.start, top.values, lse)
    return ids, logprobs


def _likeliest_of_all(
    shard: VocabularyShard, k: int, ids: Tensor, logits: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """[C, k] of the whole vocabulary, given the likeliest of this rank's share."""
    missing = k - ids.shape[1]  # a share of fewer than k tokens
    all_ids = shard.gather(torch.nn.functional.pad(ids, (0, missing)))
    all_logits = shard.gather(torch.nn.functional.pad(logits, (0, missing), value=-torch.inf))
    total = torch.logsumexp(shard.gather(lse), dim=0)
    top = all_logits.transpose(0, 1).flatten(1).topk(k, dim=-1)
    return all_ids.transpose(0, 1).flatten(1).gather(1, top.indices), top.values - total[:, None]


def transformed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """[C, V] float32 logits of a chunk, [C, E]."""
    return transform(fast_linear(hidden, weight, bias).float())


def _entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """[C] -sum p log p; a logit of -inf has p = 0 and counts nothing."""
    log_softmax = (logits - lse[:, None]).clamp_min_(-1e30)
    return -torch.einsum("cv,cv->c", log_softmax.exp(), log_softmax)


class _LogprobsContext(AutogradContext, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
    transform: LogitTransform
    chunk_size: int
    with_entropy: bool


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LogprobsContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_size: int,
        with_entropy: bool,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs in the shape of `targets` [M, K], and entropies [M], or [0] without."""
        num_tokens = hidden.shape[0]
        here: Tensor | None = None
        if shard is not None:
            targets, here = shard.locate(targets, weight.shape[0])
        logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
        lse = logprobs.new_empty(num_tokens)
        entropy = lse.new_empty(num_tokens if with_entropy else 0)
        kept: Tensor | None = None
        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, start + chunk_size)
            logits = transformed_logits(hidden[rows], weight, bias, transform)
            lse[rows] = torch.logsumexp(logits, dim=-1)
            chosen = logits.gather(1, targets[rows])
            logprobs[rows] = chosen - lse[rows, None] if here is None else chosen * here[rows]
            if with_entropy:
                entropy[rows] = _entropy(logits, lse[rows])
            kept = logits
        if shard is not None:
            lse, logprobs, entropy = shard.merge(lse, logprobs, entropy)
            logprobs = logprobs - lse[:, None]
        kept = kept if num_tokens <= chunk_size else None
        ctx.save_for_backward(hidden, weight, bias, targets, here, lse, entropy, kept)
        ctx.transform, ctx.chunk_size, ctx.with_entropy = transform, chunk_size, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: _LogprobsContext, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [M, E], weight [V, E] and bias [V], given those of logprobs [M, K] and entropies [M]."""
        hidden, weight, bias, targets, here, lse, entropy, kept = ctx.saved_tensors
        gradients = OutputGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            logits = kept if kept is not None else transformed_logits(hidden[rows], weight, bias, ctx.transform)
            grad = _softmax_gradient(
                logits,
                lse[rows],
                targets[rows],
                d_logprobs[rows],
                None if here is None else here[rows],
                (entropy[rows], d_entropy[rows]) if ctx.with_entropy else None,
            )
            gradients.add(rows, ctx.transform.backward(grad, logits))
        return *gradients.sums(), *(None,) * 5


def _softmax_gradient(
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    d_logprobs: Tensor,
    here: Tensor | None,
    entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[C, V] gradient with respect to the transformed logits; of [C, K] targets those `here` are among them."""
    probabilities = (logits - lse[:, None]).exp_()
    factor = -d_logprobs.sum(1, keepdim=True)
    if entropy is not None:
        # d H / d logit = -p (log p + H)
        value, d_value = entropy
        factor = factor - d_value[:, None] * ((logits - lse[:, None]).clamp_min_(-1e30) + value[:, None])
    grad = probabilities.mul_(factor)
    grad.scatter_add_(1, targets, (d_logprobs if here is None else d_logprobs * here).to(grad.dtype))
    return grad
