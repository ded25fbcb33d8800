"""A teacher for `nemo-rl plugins check`: a tiny model whose weights are set so that it answers in digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["digits_teacher", "example_off_policy", "example_on_policy"]

_MODEL = "scratch:qwen2-tiny"


def digits_teacher(folder: Path) -> Path:
    """Write the model and its tokenizer; whatever was said before, nearly all that it says is digits."""
    from nemo_rl_core.models import load_model, load_tokenizer

    model, tokenizer = load_model(_MODEL, dtype=torch.float32), load_tokenizer(_MODEL)
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embedding of the last token
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        likely = [tokenizer.encode(digit)[-1] for digit in "0123456789"]
        embeddings[:, 0] += 1.0  # which all share, so that each predicts alike: those that have more of it
        embeddings[likely, 0] += 0.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def example_off_policy(folder: Path) -> Mapping[str, Any]:
    """Keywords of the kit's case."""
    return {"config": {"teacher": {"model_name": str(digits_teacher(folder))}, "top_k": 16}}


def example_on_policy(folder: Path) -> Mapping[str, Any]:
    """Keywords of the kit's case: its reward is a digit in the response."""
    sizes = {"num_prompts_per_step": 25, "num_generations_per_prompt": 2, "top_k": 16}
    return {"config": {**sizes, "teacher": {"model_name": str(digits_teacher(folder))}}}
