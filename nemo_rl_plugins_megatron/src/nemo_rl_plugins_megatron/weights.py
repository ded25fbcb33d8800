"""Hugging Face weights into the parts of the ranks, and out of them again.

Legend: layers are counted over the whole model on the Hugging Face side, and within a pipeline stage on ours.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron.families import family_of, heads_of
from nemo_rl_plugins_megatron.mapping import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nemo_rl_plugins_megatron.model import PolicyModel
    from nemo_rl_plugins_megatron.optimizer import Share
    from nemo_rl_plugins_megatron.parallel import Ranks
    from nemo_rl_plugins_megatron.pretrained import WeightSource

__all__ = ["WeightMap"]


@frozen(kw_only=True)
class _Weight:
    """A rule applied to one layer (or to none)."""

    rule: Rule
    stage: int
    ours: str
    """Name in the model of its stage; `{expert}` still stands for the number."""
    theirs: tuple[str, ...]


class WeightMap:
    """All weights of one model, by the rules of its family.

    Args:
        hf_config: The Hugging Face configuration.
        shapes: Shape of each Hugging Face weight, tied ones once.
        model: This rank's part.
        ranks: This process's place.

    Raises:
        ConfigError: The family's rules do not cover the model.
    """

    def __init__(
        self, hf_config: PreTrainedConfig, shapes: Mapping[str, Sequence[int]], model: PolicyModel, ranks: Ranks
    ) -> None:
        self.heads = heads_of(hf_config)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.ranks = ranks
        self.parameters = dict(model.named_parameters())
        self.num_local_experts = (getattr(hf_config, "num_experts", None) or 0) // ranks.ep_size
        self.rounded: set[str] = set()
        """Weights that could not take the values they were given as they are."""
        self.weights = list(self._apply(family_of(hf_config).rules, hf_config.num_hidden_layers))
        self._check(hf_config.model_type)

    def _apply(self, rules: Sequence[Rule], num_layers: int) -> Iterator[_Weight]:
        per_stage = num_layers // self.ranks.pp_size
        for rule in (rule for rule in rules if not rule.per_layer):
            stage = 0 if rule.ours.startswith("embedding.") else self.ranks.pp_size - 1
            yield _Weight(rule=rule, stage=stage, ours=rule.ours, theirs=rule.theirs)
        for layer in range(num_layers):
            for rule in (rule for rule in rules if rule.per_layer):
                yield _Weight(
                    rule=rule,
                    stage=layer // per_stage,
                    ours=rule.ours.replace("{layer}", str(layer % per_stage)),
                    theirs=tuple(name.replace("{layer}", str(layer)) for name in rule.theirs),
                )

    def _check(self, model_type: str) -> None:
        """Keep the weights that this model has; each of its weights must come from one rule, each of ours go to one."""
        self.weights = [weight for weight in self.weights if all(name in self.shapes for name in weight.theirs)]
        covered = [name for weight in self.weights for name in weight.theirs]
        missing = sorted(self.shapes.keys() - set(covered)) + sorted({n for n in covered if covered.count(n) > 1})
        ours = {name for weight in self.weights if weight.stage == self.ranks.pp_index for name in self._names(weight)}
        missing += sorted(ours ^ (self.parameters.keys() - self._tied_copy()))
        if missing:
            raise ConfigError(
                f"The rules of the family {model_type!r} do not fit this model: {', '.join(missing[:4])} "
                f"({len(missing)} weights). Complete nemo_rl_plugins_megatron/families.py, or set "
                "policy.backend: dtensor."
            )

    def _names(self, weight: _Weight) -> list[str]:
        """Ours on this rank."""
        if not weight.rule.per_expert:
            return [weight.ours]
        return [weight.ours.replace("{expert}", str(i)) for i in range(self.num_local_experts)]

    def _tied_copy(self) -> set[str]:
        """The output layer that a last pipeline stage has beside the embedding of the first, if they are tied."""
        return {"output_layer.weight"} & self.parameters.keys() if "lm_head.weight" not in self.shapes else set()

    # -- in -----------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, source: WeightSource) -> None:
        """Set this rank's part; only what is in it is read, one weight after another."""
        self.rounded = set()
        for name, part in self._parts(source):
            parameter = self.parameters[name]
            parameter.copy_(part)
            if parameter.dtype != part.dtype and not torch.equal(parameter.to(part), part):
                self.rounded.add(name)

    @torch.no_grad()
    def load_masters(self, source: WeightSource, shares: Iterable[Share]) -> None:
        """Give the optimizer's float32 copies the values that the weights were rounded from."""
        mine = {id(self.parameters[name]): name for name in self.rounded}
        held = {
            mine[id(one.weight)]: one for one in shares if id(one.weight) in mine and one.part.stop > one.part.start
        }
        for name, part in self._parts(source, only=held.keys()):
            master = held[name].tensors["param"]
            master.copy_(part.flatten()[held[name].part].view_as(master))

    def _parts(self, source: WeightSource, only: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield of each weight of this rank, or of some, its part [...] by its name."""
        ranks = self.ranks
        for weight in (weight for weight in self.weights if weight.stage == ranks.pp_index):
            cut = weight.rule.form.cut
            for i, name in enumerate(self._names(weight)):
                if only is not None and name not in only:
                    continue
                if weight.rule.per_expert:
                    expert = ranks.ep_index * self.num_local_experts + i
                    experts = [source.read_expert(one, expert) for one in weight.theirs]
                    yield name, cut(experts, ranks.etp_index, ranks.etp_size, self.heads)
                else:
                    whole = [source.read(one) for one in weight.theirs]
                    yield name, cut(whole, ranks.tp_index, ranks.tp_size, self.heads)
        for name in self._tied_copy():
            if only is None or name in only:
                embedding = next(weight for weight in self.weights if weight.ours.startswith("embedding."))
                whole = [source.read(embedding.theirs[0])]
                yield name, embedding.rule.form.cut(whole, ranks.tp_index, ranks.tp_size, self.heads)

    # -- out ----------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor [...]) on every rank; a collective."""
        ranks = self.ranks
        for weight in self.weights:
            if weight.stage == ranks.pp_index:
                whole = self._joined(weight)
            else:
                example = next(iter(self.parameters.values()))
                whole = [example.new_empty(self.shapes[name]) for name in weight.theirs]
            ranks.from_stage(weight.stage, whole)
            yield from zip(weight.theirs, whole, strict=True)

    def _joined(self, weight: _Weight) -> list[Tensor]:
        """The whole tensors of a weight of this stage."""
        ranks, form = self.ranks, weight.rule.form
        parts = [self.parameters[name].detach() for name in self._names(weight)]
        if not weight.rule.per_expert:
            return [t.contiguous() for t in form.join(ranks.gather(parts[0], ranks.tp_group), self.heads)]
        experts = [form.join(ranks.gather(part, ranks.etp_group), self.heads) for part in parts]
        stacked = [torch.stack(one) for one in zip(*experts, strict=True)]
        return [torch.cat(ranks.gather(tensor, ranks.ep_group)) for tensor in stacked]
