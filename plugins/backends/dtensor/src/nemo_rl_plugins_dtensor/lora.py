"""Low-rank adapters in the layers of a model, by the PEFT library.

A linear layer W [O, I] computes x W' + scale * x A' B' with A [r, I] and B [O, r]; only A and B are trained. What
leaves the backend as weights is W + scale * B A under the name of W, computed one layer at a time. Where the model has
a scalar head, the head is trained and saved with the adapters: no checkpoint has one that fits.

Legend: O outputs and I inputs of a layer, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemo_rl_core.errors import CheckpointError, ConfigError
from nemo_rl_plugins_dtensor.config import LoRAConfig
from nemo_rl_plugins_dtensor.parallel import local_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["DEFAULT_RANK", "Adapters"]

_NAME = "default"
_BASE = ".base_layer."
_PEFT_PREFIX = "base_model.model."
DEFAULT_RANK = 16
_Full = Callable[[Tensor, torch.dtype], Tensor]


class Adapters:
    """The adapters of one model; making them puts them into it and freezes everything else.

    A new adapter changes nothing: its B is 0. Its A is drawn from `seed`.

    Args:
        model: A model of `transformers`, whole, on the CPU.
        config: See `LoRAConfig`.
        model_name: Written into the adapter's configuration.
        seed: Draws new adapters; the global RNG is left as it was.
        dtype: Of what is trained.

    Raises:
        ConfigError: PEFT is not installed, the layers named do not exist or cannot be adapted, or the adapter of
            `config.path` is missing, of another kind, or does not fit the model.
    """

    def __init__(
        self, model: PreTrainedModel, config: LoRAConfig, *, model_name: str, seed: int, dtype: torch.dtype
    ) -> None:
        self.peft = _peft_config(config, model, model_name)
        self.layers = _inject(self.peft, model, seed)
        self.head = "score" if getattr(model, "score", None) is not None else None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._is_trained(name))
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.is_new = config.path is None
        if config.path is not None:
            self._load(model, Path(config.path).expanduser())
        self._weights: Mapping[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def _is_trained(self, name: str) -> bool:
        return ".lora_" in name or (self.head is not None and name.startswith(f"{self.head}."))

    def attach(self, weights: Mapping[str, Tensor]) -> None:
        """Take the parameters [...] of the model as they are laid out over the ranks, and remember where they start."""
        self._weights = weights
        self.train(False)
        if not self.is_new or self.head is not None:
            self._start = {name: local_part(p).detach().clone() for name, p in self.trained().items()}

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors [...] that checkpoints include, by parameter name."""
        return {name: p for name, p in self._weights.items() if self._is_trained(name)}

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part [...] of each weight below the adapters."""
        for name, parameter in self._weights.items():
            if not self._is_trained(name):
                yield name, local_part(parameter).detach()

    def train(self, on: bool) -> None:
        """Switch the dropout of the adapters."""
        for layer in self.layers.values():
            layer.lora_dropout.train(on)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Within it, a forward pass is that of the model as `attach` found it."""
        if not self._start:
            for layer in self.layers.values():
                layer._disable_adapters = True
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer._disable_adapters = False
            return
        parts = {name: local_part(p).detach() for name, p in self.trained().items()}
        current = {name: part.clone() for name, part in parts.items()}
        try:
            _copy(parts, self._start)
            yield
        finally:
            _copy(parts, current)

    # -- weights out --------------------------------------------------------------------------

    def merged(self, full: _Full, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield (the model's own name, whole tensor [...]) with the adapters added; no weight is touched.

        Args:
            full: Gathers a parameter over the ranks; every rank must exhaust the iterator.
            dtype: Of the tensors.
        """
        for name, parameter in self._weights.items():
            if ".lora_" in name:
                continue
            module, found, leaf = name.partition(_BASE)
            if found and leaf == "weight":
                yield f"{module}.weight", (full(parameter, torch.float32) + self._delta(module, full)).to(dtype)
            else:
                yield f"{module}.{leaf}" if found else name, full(parameter, dtype)

    def _delta(self, module: str, full: _Full) -> Tensor:
        """[O, I] float32 that the adapter adds to the weight of `module` (transposed where the layer keeps [I, O])."""
        layer = self.layers[module]
        a, b = (full(self._weights[f"{module}.lora_{x}.{_NAME}.weight"], torch.float32) for x in "AB")
        delta = b @ a
        scale: float = layer.scaling[_NAME]
        return (delta.T if layer.fan_in_fan_out else delta) * scale

    def save(self, path: Path, full: _Full, *, is_first: bool) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `path`, as `PeftModel` reads them.

        Args:
            path: Folder; made if it is missing.
            full: See `merged`.
            is_first: Whether this rank writes.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {_peft_name(name): full(p, p.dtype).contiguous().cpu() for name, p in self.trained().items()}
        if not is_first:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
            self.peft.modules_to_save = [self.head] if self.head else None
            self.peft.inference_mode = True
            if isinstance(self.peft.target_modules, set):  # in an order that is the same in every run
                self.peft.target_modules = sorted(self.peft.target_modules)
            self.peft.save_pretrained(path)
        except Exception as error:  # safetensors has a type of its own for a full disk
            raise CheckpointError(f"Cannot write the adapter to {path}: {error}. Check free space.") from error

    # -- weights in ---------------------------------------------------------------------------

    def _load(self, model: nn.Module, folder: Path) -> None:
        from peft.utils import load_peft_weights

        where = f"policy.options.lora.path: the adapter in {folder}"
        try:
            found = load_peft_weights(str(folder), device="cpu")
        except Exception as error:  # a file that is missing, cut off or of another format
            raise ConfigError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        wanted = {_peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        if self.head and f"{_PEFT_PREFIX}{self.head}.weight" not in found:  # of a language model: the head starts anew
            wanted.pop(f"{_PEFT_PREFIX}{self.head}.weight")
        if other := sorted(found.keys() ^ wanted.keys()):
            raise ConfigError(
                f"{where} is not one of this model: they differ in {', '.join(other[:3])}"
                f"{' and others' if len(other) > 3 else ''}. Set policy.model_name to the model it was trained on."
            )
        for name, parameter in wanted.items():
            if found[name].shape != parameter.shape:
                raise ConfigError(
                    f"{where} is not one of this model: {name} has shape {list(found[name].shape)}, here it is "
                    f"{list(parameter.shape)}. Set policy.model_name to the model it was trained on."
                )
            parameter.data.copy_(found[name])


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(values[name])


def _peft_name(name: str) -> str:
    """The name of a parameter in PEFT's files."""
    return _PEFT_PREFIX + name.replace(f".{_NAME}.", ".")


def _peft_config(config: LoRAConfig, model: PreTrainedModel, model_name: str) -> Any:
    """PEFT's configuration of the adapter: that of its folder, or from ours."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "policy.options.lora needs the package peft, which is not installed: pip install 'nemo-rl-dtensor[lora]'"
        ) from error
    if config.path is not None:
        return _stored_config(config)
    rank = config.rank or DEFAULT_RANK
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]  # any number serves
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or "all-linear",
        use_rslora=config.rank_stabilized,
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else "SEQ_CLS",
        base_model_name_or_path=model_name,
    )


def _stored_config(config: LoRAConfig) -> Any:
    """The configuration in `config.path`; what is set beside it must agree."""
    from peft import LoraConfig, PeftConfig

    folder = Path(str(config.path)).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"policy.options.lora.path: {folder} holds no adapter (no adapter_config.json). Give a folder that "
            "PEFT, or a run with policy.options.lora, has written."
        )
    try:
        found = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # any content that PEFT does not know
        raise ConfigError(f"policy.options.lora.path: {folder}/adapter_config.json cannot be read: {error}") from error
    unknown = [
        name
        for name in ("use_dora", "trainable_token_indices", "target_parameters", "layer_replication")
        if getattr(found, name, None)
    ]
    if not isinstance(found, LoraConfig) or unknown or found.bias != "none":
        what = ", ".join(unknown) or (f"bias {found.bias!r}" if isinstance(found, LoraConfig) else found.peft_type)
        raise ConfigError(f"policy.options.lora.path: the adapter in {folder} uses {what}; only plain LoRA is known.")
    for name, ours, theirs in (("rank", config.rank, found.r), ("alpha", config.alpha, found.lora_alpha)):
        if ours is not None and ours != theirs:
            raise ConfigError(
                f"policy.options.lora.{name} is {ours}, but the adapter in {folder} has {theirs}. Remove it."
            )
    if config.target_modules or config.rank_stabilized:
        raise ConfigError(
            "policy.options.lora: target_modules and rank_stabilized are those of the adapter in `path`; remove them."
        )
    found.lora_dropout = config.dropout
    found.inference_mode = False
    found.modules_to_save = None  # the head is ours to train
    return found


def _inject(peft: Any, model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Put the adapters in; the adapted layers by the name of their module."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            inject_adapter_in_model(peft, model, _NAME)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"policy.options.lora.target_modules: {error} Linear layers of {type(model).__name__}: {', '.join(linear)}."
        ) from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    outer = {
        id(m): what
        for m, what in (
            (model.get_output_embeddings(), "output layer"),
            (model.get_input_embeddings(), "embedding"),
            (getattr(model, "score", None), "head"),
        )
        if m is not None
    }
    for name, layer in layers.items():
        if id(layer) in outer or not set(layer.lora_A) == set(layer.lora_B) == {_NAME}:
            raise ConfigError(
                f"policy.options.lora.target_modules: {name} is the model's {outer.get(id(layer), 'embedding')}, which "
                "cannot have an adapter here. Name linear layers of the decoder."
            )
    return layers
