"""Configuration of reward models, of their loss and of their use: every default in one place."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Factory, evolve, field, frozen

from nemo_rl_core.schema import ComponentChoice, PolicyConfig, RunConfig, component
from nemo_rl_core.schema.validators import ge, gt, le, one_of

__all__ = ["BradleyTerryConfig", "RewardModelConfig", "RewardModelRewardConfig"]


@frozen(kw_only=True)
class BradleyTerryConfig:
    """Options of the loss `bradley_terry`."""

    margin_weight: float = field(default=0.0, validator=ge(0))
    """Times the margin of a row (how much better its chosen answer is), this is the distance asked of the scores."""
    center_coefficient: float = field(default=0.0, validator=ge(0))
    """Weight of (chosen score + rejected score)^2, which holds the scores around 0; 0.01 is usual."""


@frozen(kw_only=True)
class RewardModelConfig(RunConfig):
    """A run that trains a reward model: `algorithm: reward_model`."""

    algorithm: Any = "reward_model"
    batch_size: int = field(default=32, validator=ge(1))
    """Pairs of one optimizer step."""
    loss: ComponentChoice = component("losses", "bradley_terry")
    """The objective."""

    def __attrs_post_init__(self) -> None:
        """A reward model gives one number, so `policy.head` need not be set."""
        if isinstance(self.policy, PolicyConfig):
            object.__setattr__(self, "policy", evolve(self.policy, head="scalar"))

    @property
    def num_items_per_step(self) -> int:
        """Pairs of one step."""
        return self.batch_size


@frozen(kw_only=True)
class RewardModelRewardConfig:
    """Options of the reward `reward_model`."""

    model: str
    """Folder (such as `<run_dir>/model` of a `reward_model` run) or hub name of a sequence classifier of one label."""
    batch_size: int = field(default=8, validator=ge(1))
    """Responses of one forward pass. Every pass has this many rows, filled up if need be, so that a score depends on
    nothing but its own text."""
    window_s: float = field(default=0.005, validator=[ge(0), le(1)])
    """Seconds for which the first response waits for others to be scored with."""
    max_sequence_length: int = field(default=2048, validator=ge(2))
    """Tokens of prompt and response together; a longer one loses its end, as in training."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", validator=one_of("auto", "cpu", "cuda"))
    """Where the model runs: auto is cuda if there is a GPU."""
    precision: Literal["float32", "bfloat16"] = field(default="float32", validator=one_of("float32", "bfloat16"))
    """Type of the weights."""
    scale: float = field(default=1.0, validator=gt(0))
    """Factor on the score."""
    chat_template_kwargs: dict[str, Any] = Factory(dict)
    """Further variables of the chat template; those the model was trained with."""
