"""Reference computations of the kits: a tiny model, its plain forward pass, and a plain training loop.

Everything is the slow and obvious way: one sequence at a time, Hugging Face's own attention, float32.

Legend: T tokens of one sequence, N tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.protocols.loss import Denominator, Loss, LossSums, Metric, ModelOutputs
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import OptimizerConfig

__all__ = [
    "TINY_SHAPE",
    "LargestTensor",
    "Likelihood",
    "ReferenceStep",
    "ReferenceTrainer",
    "TinyModel",
    "ValuesToOne",
    "WeightedLoss",
    "forward_logits",
    "forward_logprobs",
    "ragged_batch",
    "sampling_distribution",
    "tiny_model",
]

TINY_SHAPE: Mapping[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 104,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""A model of 20,000 parameters whose attention matters to what it predicts, with tied embeddings and with a dropout
that a backend must switch off. Its 104 tokens are single characters."""


@frozen(eq=False)
class TinyModel:
    """A Hugging Face checkpoint on disk, and the same model here to compare with."""

    folder: str
    """What `model_name` is set to."""
    model: PreTrainedModel
    """In float32, in evaluation mode, with the attention of the library; never changed."""
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """The size V of the vocabulary."""
        return int(self.model.config.vocab_size)

    def weights(self) -> dict[str, Tensor]:
        """Copy the parameters by name, each [...] of its own shape; a tied one comes once."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def copy(self, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
        """Copy the model, with other weights [...] by name if they are given."""
        import copy

        made = copy.deepcopy(self.model)
        if weights is not None:
            with torch.no_grad():
                for name, parameter in made.named_parameters():
                    parameter.copy_(weights[name])
        return made

    def changed_weights(self, seed: int = 1) -> dict[str, Tensor]:
        """Make other weights of the same shapes [...]: half the old ones and half new noise."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: 0.5 * value + 0.2 * torch.randn(value.shape, generator=generator)
            for name, value in self.weights().items()
        }


def tiny_model(shape: Mapping[str, Any] = TINY_SHAPE) -> TinyModel:
    """Return the checkpoint of this shape, made once per process from a fixed seed."""
    return _made(json.dumps(dict(shape), sort_keys=True))


@lru_cache(maxsize=8)
def _made(shape: str) -> TinyModel:
    folder = tempfile.TemporaryDirectory(prefix="nemo-rl-kit-", ignore_cleanup_errors=True)
    _kept.append(folder)
    path = Path(folder.name)
    (path / "config.json").write_text(shape)
    model = load_model(f"scratch:{path}", dtype=torch.float32, seed=7, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(f"scratch:{path}")
    model.save_pretrained(path)
    tokenizer.save_pretrained(str(path))
    return TinyModel(str(path), model.requires_grad_(False), tokenizer)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Folders of the models, removed when the process ends."""


# -- the plain forward pass ------------------------------------------------------------------------------


def forward_logits(model: PreTrainedModel, ids: Sequence[int] | Tensor) -> Tensor:
    """[T, V] float32 logits after each token of one sequence."""
    found: Tensor = model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0].float()
    return found


def forward_logprobs(model: PreTrainedModel, batch: BatchedDataDict, temperature: float = 1.0) -> Tensor:
    """[N] logprobs of a batch's tokens, each sequence alone; 0 at each first token."""
    parts = []
    for ids in batch.unpack("input_ids"):
        predicted = (forward_logits(model, ids)[:-1] / temperature).log_softmax(-1)
        parts.append(torch.cat([predicted.new_zeros(1), predicted.gather(1, ids[1:, None])[:, 0]]))
    return torch.cat(parts)


def sampling_distribution(logits: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """[..., V] logprobs of the distribution that a token is drawn from; -inf where it cannot be drawn.

    Top-k comes before top-p, which keeps the smallest set of at least that probability. Temperature 0 stands for the
    untempered distribution.
    """
    scaled = (logits / (temperature or 1.0)).log_softmax(-1)
    ordered, order = scaled.sort(dim=-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep[..., top_k:] = False
    kept = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= kept.cumsum(-1) - kept < top_p
    limited = ordered.masked_fill(~keep, -torch.inf).log_softmax(-1)
    return torch.empty_like(limited).scatter_(-1, order, limited)


class LargestTensor(TorchDispatchMode):
    """A context that records the largest floating-point tensor that an operator makes.

    Attributes:
        numel: Its number of elements.
        shape: Its shape.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(found, Tensor) and found.is_floating_point() and found.numel() > self.numel:
                self.numel, self.shape = found.numel(), tuple(found.shape)
        return result


# -- the plain training loop -----------------------------------------------------------------------------


def ragged_batch(
    lengths: Sequence[int] = (5, 12, 9, 16, 3, 7), *, vocab_size: int = 104, seed: int = 0
) -> BatchedDataDict:
    """Make a batch of random tokens with random advantages; about two thirds are trained, never a first token."""
    from nemo_rl_core.records.batch import BatchedDataDict

    rng = torch.Generator().manual_seed(seed)
    batch = BatchedDataDict(lengths)
    n = batch.num_tokens
    batch.set_tokens("input_ids", torch.randint(3, vocab_size, (n,), generator=rng))
    last = batch.position_ids == batch.lengths[batch.sequence_index] - 1
    batch.set_tokens("loss_mask", ((torch.rand(n, generator=rng) > 0.3) | last) & (batch.position_ids > 0))
    batch.set_tokens("advantages", torch.randn(n, generator=rng))
    return batch


@define(eq=False)
class WeightedLoss:
    """-sum(advantage * logprob) over the trained tokens; remembers what it was given."""

    needs: frozenset[str] = frozenset({"logprobs"})
    denominator: Denominator = "tokens"
    seen: list[tuple[ModelOutputs, BatchedDataDict]] = field(factory=list)

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """The sum, with the mean logprob and the number of trained tokens as metrics."""
        self.seen.append((outputs, batch))
        mask = batch["loss_mask"]
        assert outputs.logprobs is not None, "the backend filled no logprobs, which the loss needs"
        total = -(outputs.logprobs * batch["advantages"] * mask).sum()
        found = outputs.logprobs.detach()
        metrics = {
            "logprob": Metric((found * mask).sum(), mask.sum()),
            "lowest": Metric(found.masked_fill(~mask, 0.0).min(), reduction="min"),
            "trained": Metric(mask.sum().float(), reduction="sum"),
        }
        return LossSums(total, metrics)


class Likelihood:
    """Minus the logprob of each trained token, read in one of two ways.

    Args:
        output: "logprobs", or "over_vocabulary", which picks it from the whole distribution.
    """

    denominator: Denominator = "tokens"
    vocabulary_fields = ("input_ids",)

    def __init__(self, output: str) -> None:
        self.needs: frozenset[str] = frozenset({output})

    def over_vocabulary(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """[C, 1] logprob of each of C tokens, from the logprobs [C, V] of the whole vocabulary."""
        return logprobs.gather(1, fields["input_ids"][:, None])

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """The sum over the trained tokens."""
        (name,) = self.needs
        found = getattr(outputs, name)
        assert found is not None, f"the backend filled no {name}, which the loss needs"
        return LossSums(-found.view(-1).masked_fill(~batch["loss_mask"], 0.0).sum())


class ValuesToOne:
    """The squared distance of each trained token's value from 1."""

    needs: frozenset[str] = frozenset({"values"})
    denominator: Denominator = "tokens"

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """The sum over the trained tokens."""
        assert outputs.values is not None, "the backend filled no values, which the loss needs"
        return LossSums((outputs.values - 1).square().masked_fill(~batch["loss_mask"], 0.0).sum())


@frozen(kw_only=True)
class ReferenceStep:
    """The result of one step of the plain loop."""

    loss: float
    grad_norm: float
    """Before clipping."""


class ReferenceTrainer:
    """A plain PyTorch loop: one sequence at a time, one backward pass, `clip_grad_norm_`, AdamW.

    Args:
        model: A model of its own; it is trained in place.
        optimizer: Settings of AdamW.
        max_grad_norm: See `PolicyConfig`.
        loss: Makes the loss; anew for each step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerConfig,
        *,
        max_grad_norm: float | None = None,
        loss: Callable[[], Loss] = WeightedLoss,
    ) -> None:
        self.model = model.requires_grad_(True).eval()
        self.max_grad_norm = max_grad_norm
        self.loss = loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )

    def step(
        self, batch: BatchedDataDict, *, temperature: float = 1.0, learning_rate: float | None = None
    ) -> ReferenceStep:
        """Take one optimizer step on the whole batch."""
        for group in self.optimizer.param_groups if learning_rate is not None else ():
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss_fn = NormalizedLoss(self.loss(), count_trained(batch))
        total = loss_fn(ModelOutputs(logprobs=forward_logprobs(self.model, batch, temperature)), batch).total
        total.backward()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        return ReferenceStep(loss=float(total.detach()), grad_norm=float(norm))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of each parameter, [...] of its own shape."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()
