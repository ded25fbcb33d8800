"""Configuration of supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from nemo_rl_core.schema import ComponentChoice, RunConfig, component
from nemo_rl_core.schema.validators import ge, one_of

__all__ = ["SFTConfig"]

TrainOn = Literal["assistant", "last_assistant", "all"]


@frozen(kw_only=True)
class SFTConfig(RunConfig):
    """A supervised run: `algorithm: sft`."""

    algorithm: Any = "sft"
    batch_size: int = field(default=32, validator=ge(1))
    """Examples of one optimizer step; they are packed into micro-batches of
    `policy.max_tokens_per_microbatch` tokens."""
    train_on: TrainOn = field(default="assistant", validator=one_of("assistant", "last_assistant", "all"))
    """Tokens that are trained: those of every assistant turn, of the last one only, or the whole text."""
    loss: ComponentChoice = component("losses", "nll")
    """The objective."""

    @property
    def num_items_per_step(self) -> int:
        """Examples of one step."""
        return self.batch_size
