"""Sources of models: a hub name, a local folder, or `scratch:` for random weights.

`scratch:<name>` takes a shape shipped with the core (`scratch:qwen2-1m`), `scratch:<folder>` any folder
with a Hugging Face `config.json`. Its weights are drawn from a seed, its tokenizer stands in the folder
or is one shipped with the core. Nothing is downloaded for a scratch model.

A folder with an adapter in PEFT's format, such as a run with low-rank adapters leaves, stands for the model that the
adapter names with the adapter added to its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models.adapter import add_adapter, base_of, is_classifier

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from nemo_rl_core.models.tokenizer import Tokenizer

__all__ = [
    "eos_token_ids",
    "is_scratch",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "located",
    "scratch_names",
]

_PREFIX = "scratch:"
_CLASSIFIER = "ForSequenceClassification"
_SCRATCH = Path(__file__).parent / "scratch"


def is_scratch(model_name: str) -> bool:
    """Whether the name asks for random weights."""
    return model_name.startswith(_PREFIX)


def scratch_names() -> list[str]:
    """Names of the shapes shipped with the core."""
    return sorted(p.parent.name for p in _SCRATCH.glob("*/config.json"))


def _scratch_folder(model_name: str) -> Path:
    target = model_name.removeprefix(_PREFIX)
    for folder in (_SCRATCH / target, Path(target).expanduser()):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"model {model_name!r}: no shape of that name and no folder with a config.json at {target!r}. "
        f"Shapes shipped: {', '.join(_PREFIX + name for name in scratch_names())}."
    )


def located(model_name: str) -> str:
    """The name as a process with another working directory understands it: the path of a local folder is absolute."""
    prefix = _PREFIX if is_scratch(model_name) else ""
    target = model_name.removeprefix(prefix)
    if prefix and (_SCRATCH / target).is_dir():
        return model_name
    folder = Path(target).expanduser()
    return f"{prefix}{folder.absolute()}" if folder.is_dir() else model_name


def _explain(model_name: str, what: str, error: Exception) -> ConfigError:
    path = Path(model_name).expanduser()
    if path.exists():
        reason = f"the folder {path} cannot be read as a Hugging Face checkpoint"
    else:
        reason = "it is neither a folder here nor could it be loaded from the Hugging Face hub"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"Cannot load the {what} of model {model_name!r}: {reason} ({type(error).__name__}: {first_line}). "
        "Check the name, give a local folder with config.json, or use a model made here, such as "
        f"{_PREFIX}{scratch_names()[0]}."
    )


def load_model_config(model_name: str) -> PreTrainedConfig:
    """The `transformers` configuration of the model.

    Raises:
        ConfigError: No such model.
    """
    from transformers import AutoConfig

    if base := base_of(model_name):
        model_config = load_model_config(base)
        if is_classifier(model_name):
            names = model_config.architectures or ["ForCausalLM"]
            model_config.architectures = [name.replace("ForCausalLM", _CLASSIFIER) for name in names]
        return model_config
    source = str(_scratch_folder(model_name)) if is_scratch(model_name) else model_name
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(source)
        return found
    except (OSError, ValueError, KeyError) as error:
        raise _explain(model_name, "configuration", error) from error


def load_tokenizer(model_name: str, *, chat_template: str | None = None) -> Tokenizer:
    """Load the model's tokenizer, with `chat_template` (Jinja text or the path of a file) put in if given.

    Raises:
        ConfigError: No such tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = model_name
    if is_scratch(model_name):
        shape = _scratch_folder(model_name)
        name = json.loads((shape / "config.json").read_text(encoding="utf-8")).get("tokenizer", "char")
        source = str(shape if (shape / "tokenizer.json").is_file() else _SCRATCH / "tokenizers" / name)
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        if base := base_of(source):
            return load_tokenizer(base, chat_template=chat_template)
        raise ConfigError(
            f"The folder {folder} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab file). "
            "Copy the model's tokenizer there, or set policy.tokenizer_name."
        )
    try:
        # AutoTokenizer overrides a plain tokenizer.json by the class that is usual for the model's type.
        plain = _tokenizer_class(folder) in ("PreTrainedTokenizerFast", "TokenizersBackend")
        loader: Any = PreTrainedTokenizerFast if plain else AutoTokenizer
        tokenizer = loader.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(model_name, "tokenizer", error) from error
    if chat_template is not None:
        path = Path(chat_template)
        is_file = len(chat_template) < 1024 and "{" not in chat_template and path.is_file()
        tokenizer.chat_template = path.read_text(encoding="utf-8") if is_file else chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: Tokenizer = tokenizer
    return loaded


def _tokenizer_class(folder: Path) -> str | None:
    """The class a local tokenizer names, if there is one."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class") if path.is_file() else None


def load_model(
    model_name: str,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    head: Literal["lm", "scalar"] = "lm",
    attn_implementation: str | None = None,
    empty: bool = False,
) -> Any:
    """Load or make the model, on the CPU.

    Args:
        model_name: See the module.
        dtype: Of the parameters.
        seed: Draws the weights of a scratch model; the global RNG is left as it was.
        head: "lm" gives a causal language model; "scalar" the same with one number for each token in place of the
            logits (a sequence classifier of one label; the head is drawn from `seed` if the checkpoint has none).
        attn_implementation: Name of a registered attention function.
        empty: Make the module on the meta device without weights (for sharding, or to be refitted).

    Raises:
        ConfigError: No such model, or a folder that is not a readable checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    if base := base_of(model_name):
        below = load_model(
            base, dtype=dtype, seed=seed, head=head, attn_implementation=attn_implementation, empty=empty
        )
        return below if empty else add_adapter(below, model_name)
    config = load_model_config(model_name)
    auto: Any = AutoModelForCausalLM
    if head == "scalar":
        auto = AutoModelForSequenceClassification
        config.num_labels = 1
    if attn_implementation is None and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        attn_implementation = "eager"  # some versions of transformers choose one that leaves the cap out
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if empty:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, **extra)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if is_scratch(model_name):
                return auto.from_config(config, dtype=dtype, **extra)
            return auto.from_pretrained(model_name, config=config, dtype=dtype, **extra)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _explain(model_name, "weights", error) from error
    except Exception as error:  # safetensors raises its own type for a truncated file
        if type(error).__name__ == "SafetensorError":
            raise _explain(model_name, "weights", error) from error
        raise


def eos_token_ids(model_name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end a completion: the tokenizer's and those of the model's generation config."""
    from transformers import GenerationConfig

    model_name = base_of(model_name) or model_name
    token_ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        extra = None if is_scratch(model_name) else GenerationConfig.from_pretrained(model_name).eos_token_id
    except OSError:
        extra = None
    for token_id in [extra] if isinstance(extra, int) else (extra or []):
        if token_id not in token_ids:
            token_ids.append(token_id)
    return tuple(token_ids)
