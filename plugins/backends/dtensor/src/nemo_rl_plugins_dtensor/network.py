"""The policy: a Hugging Face decoder without its output layer, and logprobs in chunks on top.

Legend: N tokens of a micro-batch, R tokens of its row (N, or fewer where prefixes are shared), B sequences, T longest
length, M tokens whose logprob is wanted, E hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import Factory, frozen
from torch import Tensor, nn

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models.numerics.logprobs import LogitTransform
from nemo_rl_core.models.numerics.over_vocabulary import VocabularyFunction, map_vocabulary
from nemo_rl_core.models.numerics.packed_attention import Packing
from nemo_rl_core.models.numerics.vocabulary_head import (
    VOCABULARY_OUTPUTS,
    check_ids,
    differentiable_logits,
    vocabulary_outputs,
)
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_dtensor.attention import ATTENTION_NAME
from nemo_rl_plugins_dtensor.prefix import share_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["PolicyNetwork", "Row", "switch_off_dropout"]

_log = logging.getLogger(__name__)
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@frozen
class Row:
    """One micro-batch on the device, ready for the model."""

    input_ids: Tensor
    """[R]"""
    packing: Packing
    num_tokens: int
    """N"""
    wanted: Tensor
    """[M] tokens of the micro-batch whose logprob is wanted, never the first of a sequence."""
    predictors: Tensor
    """[M] for each wanted token the position in the row of the one before it, whose hidden state predicts it."""
    targets: Tensor
    """[M] the wanted tokens."""
    top_ids: Tensor | None = None
    """[M, ...] other tokens in place of each, whose logprobs are wanted too."""
    fields: Mapping[str, Tensor] = Factory(dict)
    """[M, ...] what a function over the vocabulary reads at the wanted tokens."""

    @staticmethod
    def of(
        batch: BatchedDataDict,
        *,
        device: torch.device | str,
        only_trained: bool,
        pair_cost: float | None = None,
        with_top_ids: bool = False,
        fields: Iterable[str] = (),
    ) -> Row:
        """Prepare a micro-batch that lies on the CPU.

        Args:
            batch: At least one sequence; its `input_ids`, and `loss_mask` if there is one.
            device: Where the model is.
            only_trained: Want only the tokens whose `loss_mask` is True.
            pair_cost: Share prefixes where it saves work, see `share_prefixes`; None does not.
            with_top_ids: Take `top_ids` of the batch along.
            fields: Names of further fields of the batch to take along.
        """
        want = batch.position_ids > 0
        if only_trained and "loss_mask" in batch:
            want = want & batch["loss_mask"]
        wanted = want.nonzero().squeeze(1)
        ids = batch["input_ids"]
        row_ids = ids
        shared = None if pair_cost is None else share_prefixes(batch, wanted, pair_cost=pair_cost)
        if shared is None:
            packing, predictors = Packing.of(batch.lengths.tolist(), device), wanted - 1
        else:
            row_ids, packing, predictors = ids[shared.source], shared.packing, shared.predictors

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        top_ids = move(batch["top_ids"][wanted]) if with_top_ids else None
        return Row(
            move(row_ids),
            packing.to(device),
            len(ids),
            move(wanted),
            move(predictors),
            move(ids[wanted]),
            top_ids,
            {name: move(batch[name][wanted]) for name in fields},
        )


class PolicyNetwork(nn.Module):
    """Hidden states from the decoder, logprobs from the output layer, chunk by chunk.

    Args:
        model: A causal language model of `transformers`.
        attention: See `DTensorConfig.attention`.
        chunk_size: Tokens whose logits are held at a time.
        share_prefixes: See `DTensorConfig.share_prefixes`.

    Raises:
        ConfigError: The model has no output layer, does something unknown to its logits, or cannot be run packed
            although `attention` demands it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Literal["auto", "packed", "padded"],
        chunk_size: int,
        share_prefixes: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size
        score = getattr(model, "score", None)
        self.is_scalar = score is not None and model.get_output_embeddings() is None
        if model.base_model is model or (not self.is_scalar and model.get_output_embeddings() is None):
            raise ConfigError(
                f"{type(model).__name__} is not a causal language model with an output layer; the dtensor backend "
                "cannot train it. Give a model that AutoModelForCausalLM loads."
            )
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        self.transform = LogitTransform() if self.is_scalar else LogitTransform(scale=scale, softcap=softcap)
        self.packed = False
        self.window: int | None = None
        self._choose_attention(attention)
        # A scalar head reads every token, so the row must hold every token.
        self._pair_cost = _pair_cost(model) if share_prefixes and self.packed and not self.is_scalar else None

    @property
    def head(self) -> Any:
        """The last linear layer: of the vocabulary, or of one number."""
        return self.model.score if self.is_scalar else self.model.get_output_embeddings()

    @property
    def gives(self) -> frozenset[str]:
        """What `forward` can be asked for."""
        return frozenset({"values"}) if self.is_scalar else VOCABULARY_OUTPUTS | {"over_vocabulary"}

    # -- forward ------------------------------------------------------------------------------

    def row(
        self,
        batch: BatchedDataDict,
        *,
        device: torch.device | str,
        only_trained: bool,
        with_top_ids: bool = False,
        fields: Iterable[str] = (),
    ) -> Row:
        """`Row.of` the micro-batch, its prefixes shared where this model allows it and gains by it."""
        fits = self.window is None or batch.max_length <= self.window
        if with_top_ids:
            check_ids(batch["top_ids"][batch["loss_mask"]], int(self.head.weight.shape[0]))
        return Row.of(
            batch,
            device=device,
            only_trained=only_trained,
            pair_cost=self._pair_cost if fits else None,
            with_top_ids=with_top_ids,
            fields=fields,
        )

    def forward(
        self,
        row: Row,
        *,
        temperature: float = 1.0,
        needs: frozenset[str],
        top_k: int = 0,
        function: VocabularyFunction | None = None,
    ) -> dict[str, Tensor]:
        """Run one micro-batch.

        Args:
            row: The micro-batch.
            temperature: Divides the logits; 0 counts as 1, as when tokens are drawn greedily.
            needs: Of `gives`, or "hidden_states".
            top_k: Also give the `top_ids` and `top_logprobs` [N, top_k] of the likeliest tokens, without gradient.
            function: Makes "over_vocabulary" [N, F], see `map_vocabulary`.

        Returns:
            Per need a tensor [N] (logits: [N, V], top_logprobs: [N, ...] as the row's `top_ids`); 0 where no value is
            wanted. `anchor` [] is 0 with a gradient path to the parameters, for a loss that selects nothing.
        """
        hidden = self.hidden_states(row)
        out = {"anchor": hidden[:1].sum().float() * 0.0}
        head = self.head
        if "values" in needs:
            out["values"] = nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)).float().squeeze(-1)
            return out
        transform = self._transform_at(temperature)
        bias = getattr(head, "bias", None)
        predictors = hidden.index_select(0, row.predictors)
        found = vocabulary_outputs(
            predictors,
            head.weight,
            row.targets,
            needs=needs,
            bias=bias,
            transform=transform,
            chunk_size=self.chunk_size,
            top_ids=row.top_ids,
            top_k=top_k,
        )
        if "over_vocabulary" in needs and function is not None:
            found["over_vocabulary"] = map_vocabulary(
                predictors,
                head.weight,
                function,
                row.fields,
                bias=bias,
                transform=transform,
                chunk_size=self.chunk_size,
            )
        if "hidden_states" in needs:
            found["hidden_states"] = predictors
        out |= {name: _spread(values, row) for name, values in found.items()}
        if "logits" in needs:
            logits = nn.functional.linear(predictors, head.weight, bias).float()
            out["logits"] = _spread(differentiable_logits(transform, logits), row)
        return out

    def _transform_at(self, temperature: float) -> LogitTransform:
        return LogitTransform(
            scale=self.transform.scale, softcap=self.transform.softcap, temperature=temperature or 1.0
        )

    def hidden_states(self, row: Row) -> Tensor:
        """[R, E] hidden states of the row's tokens, after the last norm."""
        base = self.model.base_model
        if self.packed:
            states = base(
                input_ids=row.input_ids[None],
                position_ids=row.packing.position_ids[None],
                use_cache=False,
                packing=row.packing,
            )
            return states.last_hidden_state[0]  # type: ignore[no-any-return]
        lengths = torch.tensor(row.packing.lengths)
        width = row.packing.max_length
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths).to(row.input_ids.device)
        place = sequence * width + row.packing.position_ids
        ids = row.input_ids.new_zeros(len(lengths) * width).index_copy_(0, place, row.input_ids)
        mask = torch.zeros_like(ids).index_fill_(0, place, 1)
        shape = (len(lengths), width)
        states = base(input_ids=ids.view(shape), attention_mask=mask.view(shape), use_cache=False)
        flat = states.last_hidden_state.reshape(len(lengths) * width, -1)
        return flat.index_select(0, place)  # type: ignore[no-any-return]

    # -- choosing the attention ---------------------------------------------------------------

    @torch.no_grad()
    def _choose_attention(self, wish: str) -> None:
        """Keep packed attention only if it gives the logits that the model itself gives."""
        probe = _probe(self.model)
        expected = torch.cat([self._plain_logits(ids) for ids in probe])
        reason = "policy.options.attention is 'padded'"
        if wish != "padded":
            reason = self._try_packed(probe, expected)
            if not reason:
                return
            if wish == "packed":
                raise ConfigError(
                    f"policy.options.attention is 'packed', but {type(self.model).__name__} cannot be run packed: "
                    f"{reason}. Set it to auto or padded."
                )
        _log.info("%s is run padded: %s.", type(self.model).__name__, reason)
        found = self._probe_logits(probe)
        if not _close(found, expected):
            raise ConfigError(
                f"{type(self.model).__name__} changes its logits in a way the dtensor backend does not know (largest "
                f"difference {float((found - expected).abs().max()):.3g} on a probe), so its logprobs would be wrong."
            )

    def _plain_logits(self, ids: Tensor) -> Tensor:
        """Return what the model as it is gives for one sequence of ids [T]: [T, V], or [T, 1] of a scalar head."""
        if not self.is_scalar:
            return self.model(input_ids=ids[None], use_cache=False).logits[0]  # type: ignore[no-any-return]
        states = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return self.head(states)  # type: ignore[no-any-return]

    def _try_packed(self, probe: list[Tensor], expected: Tensor) -> str:
        """Switch to packed attention; if its logits are not the expected [T, V], switch back and return why."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        layer_types = getattr(config, "layer_types", None) or []
        if unknown := set(layer_types) - _KNOWN_LAYERS:
            return f"it has layers of type {', '.join(sorted(unknown))}"
        try:
            self.model.set_attn_implementation(ATTENTION_NAME)
            self.packed = True
            recorded: list[int | None] = []
            found = self._probe_logits(probe, record=recorded)
            reason = _windows_missing(config, layer_types, recorded)
            if not reason and not _close(found, expected):
                reason = "packed attention gives other logits"
            self.window = min((window for window in recorded if window is not None), default=None)
        except Exception as error:  # any model code may refuse in its own way; padded is always there
            reason = f"it refuses packed attention ({type(error).__name__}: {error})"
        if reason:
            self.packed = False
            self.model.set_attn_implementation(before)
        return reason

    def _probe_logits(self, probe: list[Tensor], record: list[int | None] | None = None) -> Tensor:
        """Return logits [T, V] of the probe's sequences, packed into one row."""
        lengths = [len(ids) for ids in probe]
        batch = BatchedDataDict(lengths, {"input_ids": torch.cat(probe)})
        row = Row.of(batch, device=probe[0].device, only_trained=False)
        if record is not None:
            row.packing.record = record
        logits = nn.functional.linear(self.hidden_states(row), self.head.weight, getattr(self.head, "bias", None))
        return self.transform(logits.float()).to(logits.dtype)


def _spread(values: Tensor, row: Row) -> Tensor:
    """[M, ...] values of the wanted tokens to [N, ...], 0 elsewhere."""
    out = values.new_zeros(row.num_tokens, *values.shape[1:])
    return out.index_copy(0, row.wanted, values)


def _pair_cost(model: Any) -> float:
    """Work of attending one query to one key in all layers, where a token costs 1 in everything else."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()
    return float(2 * config.num_hidden_layers * heads * size / max(1, weights))


def _probe(model: Any) -> list[Tensor]:
    """Return two short sequences of token ids, [5] and [4]."""
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, 3 + 9, device=model.get_input_embeddings().weight.device) * 7 % vocab
    return [ids[:5], ids[5:]]


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 5e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def _windows_missing(config: object, layer_types: list[str], recorded: list[int | None]) -> str:
    """Why the windows that attention was told are not those of the configuration; empty if they are."""
    if not recorded:
        return "its layers do not call the attention interface"
    expected = layer_types.count("sliding_attention")
    if not layer_types and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        expected = len(recorded)
    told = sum(window is not None for window in recorded)
    return "" if told >= expected else f"{expected} of its layers have a sliding window, but only {told} say so"


def switch_off_dropout(model: nn.Module) -> None:
    """Logprobs of training must be those of sampling."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
