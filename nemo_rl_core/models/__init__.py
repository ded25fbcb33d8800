"""Loading and making Hugging Face models and tokenizers."""

from nemo_rl_core.models.source import (
    eos_token_ids,
    is_scratch,
    load_model,
    load_model_config,
    load_tokenizer,
    located,
    scratch_names,
)
from nemo_rl_core.models.writing import write_model

__all__ = [
    "eos_token_ids",
    "is_scratch",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "located",
    "scratch_names",
    "write_model",
]
