"""REINFORCE with a moving baseline: an algorithm, its loss and a run, in one file.

Source: Williams, 1992. The baseline is an exponential mean of past rewards (one number for all prompts), so that a
prompt needs one rollout, and it is saved with each checkpoint. Departures: advantages are not scaled.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.protocols.algorithm import BaseAlgorithm
from nemo_rl_core.protocols.loss import LossSums, Metric
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.registry import register_algorithm, register_loss, register_reward
from nemo_rl_core.schema import ComponentChoice, RunConfig, component
from nemo_rl_core.schema.validators import gt, le
from nemo_rl_core.training.trainer import Trainer


@register_loss("plain_reinforce")
class ReinforceLoss:
    """-A log p, summed over the sampled tokens."""

    denominator = "sequences"
    needs = frozenset({"logprobs"})

    def __call__(self, outputs: Any, batch: Any) -> LossSums:
        mask = batch["loss_mask"]
        logprobs = outputs.logprobs.masked_fill(~mask, 0.0)
        advantages = batch["advantages"].masked_fill(~mask, 0.0)
        mismatch = (logprobs.detach() - batch["rollout_logprobs"].masked_fill(~mask, 0.0)).abs().exp()
        error = Metric(mismatch.masked_fill(~mask, 0.0).sum(), mask.sum())
        return LossSums(-(logprobs * advantages).sum(), {"token_mult_prob_error": error})


@frozen(kw_only=True)
class ReinforceConfig(RunConfig):
    """The settings of every run, and these."""

    num_prompts_per_step: int = field(default=16, validator=gt(0))
    """Prompts of one step, one rollout each."""
    baseline_decay: float = field(default=0.9, validator=[gt(0), le(1)])
    """Share of the old baseline that each step keeps."""
    loss: ComponentChoice = component("losses", "plain_reinforce")
    """The objective."""

    @property
    def num_items_per_step(self) -> int:
        return self.num_prompts_per_step


@register_algorithm("reinforce")
class Reinforce(BaseAlgorithm):
    """One rollout a prompt, a baseline for all."""

    config_class = ReinforceConfig

    def __init__(self, config: ReinforceConfig, context: Any) -> None:
        super().__init__(config, context)
        self.loss = context.resolve("losses", config.loss)
        self.baseline: float | None = None

    def build_batch(self, items: Sequence[Any]) -> Any:
        return batch_from_groups(items)

    def finish_batch(self, batch: Any) -> Mapping[str, float]:
        """Add the advantages: reward minus the baseline of the steps before."""
        mean = float(batch["rewards"].mean())
        before = mean if self.baseline is None else self.baseline
        batch.set_tokens("advantages", batch.expand_to_tokens(batch["rewards"] - before))
        decay = self.config.baseline_decay
        self.baseline = decay * before + (1 - decay) * mean
        return {"baseline": before}

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = state["baseline"]


@register_reward("vowels")
def vowels(response: str) -> float:
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


if __name__ == "__main__":  # arguments are overrides: `python reinforce.py max_steps=100 policy.num_workers=2`
    settings = {"algorithm": "reinforce", "model": "scratch:qwen2-tiny", "learning_rate": 0.01, "reward": "vowels"}
    sizes = {"max_steps": 40, "policy": {"max_sequence_length": 24}, "generation": {"max_new_tokens": 8}}
    trainer = Trainer(finalize(load_config({**settings, **sizes}, overrides=sys.argv[1:])))
    rewards = [step["reward/mean"] for step in trainer.fit([{"prompt": f"{n}:"} for n in range(64)]).history]
    print(f"reward {rewards[0]:.3f} at first, {sum(rewards[-5:]) / len(rewards[-5:]):.3f} at last")
