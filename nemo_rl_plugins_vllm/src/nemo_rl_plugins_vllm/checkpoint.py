"""What the engine starts from: a folder that vLLM can read, and what its model looks like."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import eos_token_ids, is_scratch, load_model, load_model_config, load_tokenizer
from nemo_rl_plugins_vllm.pieces import ExpectedWeights
from nemo_rl_plugins_vllm.requests import Limits

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer


__all__ = ["checkpoint_folder", "expected_weights", "initial_weights", "limits_of", "tokenizer_of"]

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 2048


@contextmanager
def checkpoint_folder(model_name: str, *, dtype: torch.dtype, seed: int) -> Iterator[str]:
    """A name or folder that vLLM reads; a `scratch:` model is written to a folder that lives as long as the block.

    Raises:
        ConfigError: No such model.
    """
    if not is_scratch(model_name):
        load_model_config(model_name)  # says in our words what is wrong with it
        yield model_name
        return
    with tempfile.TemporaryDirectory(prefix="nemo-rl-vllm-") as folder:
        load_model(model_name, dtype=dtype, seed=seed).save_pretrained(folder)
        yield folder


def expected_weights(model_name: str, *, dtype: torch.dtype) -> ExpectedWeights | None:
    """Names and shapes of the model's weights; None for a model that transformers does not know."""
    try:
        return ExpectedWeights.of(load_model(model_name, dtype=dtype, empty=True))
    except ConfigError as error:
        logger.info("The weights of a refit cannot be checked by name and shape: %s", error)
        return None


def initial_weights(model_name: str, *, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that the engine starts with, read anew."""
    for name, parameter in load_model(model_name, dtype=dtype, seed=seed).named_parameters():
        yield name, parameter.detach()


def tokenizer_of(model_name: str) -> Any:
    """The run's tokenizer, or None."""
    try:
        return load_tokenizer(model_name)
    except ConfigError as error:
        logger.info("No tokenizer for vLLM, so no stop strings: %s", error)
        return None


def limits_of(model_name: str, tokenizer: Tokenizer, max_sequence_length: int | None) -> Limits:
    """What a request must keep to."""
    config = load_model_config(model_name).get_text_config()
    own = getattr(config, "max_position_embeddings", None)
    eos = config.eos_token_id
    configured = (eos,) if isinstance(eos, int) else tuple(eos or ())
    return Limits(
        max_length=min(max_sequence_length or own or _DEFAULT_CONTEXT, own or max_sequence_length or _DEFAULT_CONTEXT),
        vocab_size=config.vocab_size,
        eos=eos_token_ids(model_name, tokenizer) if tokenizer is not None else configured,
        has_tokenizer=tokenizer is not None,
    )
