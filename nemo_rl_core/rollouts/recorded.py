"""Rollouts on disk in place of sampling: reading them, and feeding a run with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attrs import evolve, frozen

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.registry import PluginCall
from nemo_rl_core.schema import RunConfig, ValidationConfig

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.protocols.algorithm import Algorithm
    from nemo_rl_core.records.rollout import Rollout, RolloutGroup

__all__ = ["RecordedFeed", "RecordedRollouts", "check_recorded", "read_recorded", "replay_config"]

_DECODED = 16
"""Sampled turns whose text is compared with what the tokenizer makes of their tokens."""
_SHARE = 0.5
"""The share of those that must agree: an engine may leave out a special token or a broken character."""


@frozen(kw_only=True)
class RecordedRollouts:
    """Groups read from disk."""

    source: str
    """Source of the rollouts, for messages."""
    groups: Sequence[RolloutGroup]


def read_recorded(path: str | Path) -> RecordedRollouts:
    """Read rollouts: one file, or the `rollouts` folder of a run (or the run folder), its steps in order.

    Raises:
        DataError: There is nothing there, a file is cut off, or a line is not a rollout.
    """
    source = Path(path).expanduser()
    files = [source]
    if source.is_dir():
        folder = source / "rollouts" if (source / "rollouts").is_dir() else source
        files = sorted(folder.glob("step_*.jsonl"), key=_step)
    if source.is_dir() and not files:
        raise DataError(
            f"{source} holds no recorded rollouts (rollouts/step_<n>.jsonl). Name a file, or the folder of a run that "
            "sampled with rollouts.record: true."
        )
    groups = [group for file in files for group in read_groups(file)]
    if not groups:
        raise DataError(f"{source} is empty: there are no rollouts to train on.")
    return RecordedRollouts(source=str(source), groups=groups)


def _step(path: Path) -> int:
    match = re.search(r"step_(\d+)", path.name)
    return int(match.group(1)) if match else 0


# -- whether they can be trained on -------------------------------------------------------------------------


def check_recorded(recorded: RecordedRollouts, tokenizer: Tokenizer) -> None:
    """Refuse rollouts that this model's trainer could not train on, or only in silence and wrongly.

    Raises:
        DataError: A rollout has no tokens or no logprobs, or the tokens are of another tokenizer; names the
            rollout.
    """
    size = len(cast("Sized", tokenizer))  # added tokens included, which `vocab_size` leaves out
    rollouts = [rollout for group in recorded.groups for rollout in group.valid]
    if not rollouts:
        raise DataError(f"{recorded.source}: every rollout failed when it was recorded; there is nothing to train on.")
    for rollout in rollouts:
        _check_tokens(recorded.source, rollout, size)
    _check_text(recorded.source, rollouts, ChatFormatter(tokenizer))


def _check_tokens(source: str, rollout: Rollout, size: int) -> None:
    where = f"{source}: rollout {rollout.rollout_id!r}"
    if not rollout.segments or not all(any(turn.token_ids for turn in segment) for segment in rollout.segments):
        raise DataError(
            f"{where} has no token ids, so it cannot be trained on: text is never tokenised again. Record it with "
            "nemo-rl, or with `prompt_token_ids` and `generation_token_ids` on each message of the policy."
        )
    for turn in (turn for segment in rollout.segments for turn in segment):
        if any(not 0 <= token < size for token in turn.token_ids):
            worst = max(turn.token_ids)
            raise DataError(
                f"{where} holds the token {worst}, and the tokenizer of this run knows {size} tokens. It was recorded "
                "with another tokenizer: set policy.model_name (or policy.tokenizer_name) to that of the recording."
            )
        if turn.sampled and len(turn.logprobs) != len(turn.token_ids):
            raise DataError(
                f"{where}: a sampled turn has {len(turn.token_ids)} tokens and {len(turn.logprobs)} logprobs; training "
                "needs the logprob of each under the weights that sampled it (`generation_log_probs`)."
            )
        if not math.isfinite(sum(turn.logprobs)):
            raise DataError(f"{where}: a logprob is not finite. The recording cannot be used.")


def _check_text(source: str, rollouts: Iterable[Rollout], chat: ChatFormatter) -> None:
    """The text that was recorded beside the tokens tells whether this tokenizer made them."""
    compared = agreed = 0
    example = ""
    for turn in (t for rollout in rollouts for segment in rollout.segments for t in segment if t.sampled):
        text = turn.message.get("content")
        if not turn.token_ids or not text:
            continue
        decoded = chat.decode(turn.token_ids)
        compared += 1
        if decoded.strip() == str(text).strip():
            agreed += 1
        elif not example:
            example = f"the tokens of {str(text)[:40]!r} are {decoded[:40]!r} here"
        if compared == _DECODED:
            break
    if compared and agreed < _SHARE * compared:
        raise DataError(
            f"{source} was recorded with another tokenizer: {example} ({compared - agreed} of {compared} turns). "
            "Set policy.model_name (or policy.tokenizer_name) to that of the recording."
        )


# -- training without an engine -----------------------------------------------------------------------------


def replay_config(config: RunConfig) -> RunConfig:
    """The configuration of a run on recorded rollouts: nothing is sampled, so nothing is validated or recorded."""
    return evolve(
        config,
        validation=ValidationConfig(),
        rollouts=evolve(config.rollouts, record=False),
    )


class RecordedFeed:
    """Groups from disk, in their order, as many a step as the algorithm takes.

    A group that the algorithm refuses is passed over, as it was when it was sampled, so a whole recording of a
    run gives the steps of that run.

    Args:
        recorded: The groups.
        algorithm: Says which groups may be trained on.
        num_groups: Groups of one step.
    """

    def __init__(self, recorded: RecordedRollouts, algorithm: Algorithm, num_groups: int) -> None:
        self.recorded = recorded
        self.algorithm = algorithm
        self.num_groups = num_groups
        self.discarded = 0
        """Groups that the algorithm refused in the last step."""
        self.all_groups: list[RolloutGroup] = []
        """Every group of the last step, refused ones included."""
        self._position = 0

    def next(self, version: int) -> list[RolloutGroup] | None:
        """The groups of one step; None when fewer than a step's are left.

        Raises:
            DataError: There are not enough for one step.
        """
        kept: list[RolloutGroup] = []
        seen: list[RolloutGroup] = []
        groups = self.recorded.groups
        position = self._position
        while len(kept) < self.num_groups and position < len(groups):
            group = groups[position]
            position += 1
            seen.append(group)
            with PluginCall("algorithms", self.algorithm, "keep_group"):
                if group.valid and self.algorithm.keep_group(group):
                    kept.append(group)
        if len(kept) < self.num_groups:
            if self._position == 0:
                raise DataError(
                    f"One step takes {self.num_groups} groups, and {self.recorded.source} has {len(kept)} that can be "
                    f"trained on ({len(seen)} in all). Record more, or lower the prompts per step."
                )
            return None
        self._position = position
        self.all_groups, self.discarded = seen, len(seen) - len(kept)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return the position at which the next step begins."""
        return {"recorded": self._position}

    def load_state_dict(self, state: dict[str, Any], *, version: int = 0) -> None:
        """Continue from `state_dict`.

        Raises:
            DataError: The state is that of a run that sampled.
        """
        if "recorded" not in state:
            raise DataError(
                "The checkpoint in this run folder is of a run that sampled its rollouts; it cannot be continued on "
                "recorded ones. Use another run_dir, or checkpointing.resume=never."
            )
        self._position = int(state["recorded"])


# -- sampling without a trainer -----------------------------------------------------------------------------
