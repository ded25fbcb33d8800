"""A trained reward model that scores conversations, in batches that do not change what is said of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl_core.data.encoding import ConversationEncoder
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.machine.devices import detect_devices
from nemo_rl_core.models import load_model, load_model_config, load_tokenizer

if TYPE_CHECKING:
    from nemo_rl_plugins_reward_model.config import RewardModelRewardConfig

__all__ = ["RewardScorer", "width_of"]

_NARROWEST = 32


def width_of(num_tokens: int) -> int:
    """Columns of the pass in which a sequence is scored: the power of two above its length, 32 at least."""
    return max(_NARROWEST, 1 << num_tokens.bit_length())


class RewardScorer:
    """Scores token sequences, `config.batch_size` rows of one width at a time.

    The shape of a pass follows from the length of a sequence alone: other shapes would be computed by other kernels,
    with other roundings. So a sequence has the same score in any company, and a run can be repeated bit for bit.

    Raises:
        ConfigError: The model cannot be loaded, or gives no score.
    """

    def __init__(self, config: RewardModelRewardConfig) -> None:
        self.config = config
        architectures = getattr(load_model_config(config.model), "architectures", None) or ["an unknown architecture"]
        if not any("SequenceClassification" in name for name in architectures):
            raise ConfigError(
                f"{config.model} is no reward model: it is {', '.join(architectures)}, which has no head for a score. "
                "Give the folder `<run_dir>/model` of a reward_model run, or a sequence classifier of one label."
            )
        device = detect_devices()[0] if config.device == "auto" else config.device
        self._device = torch.device(device)
        self._model = (
            load_model(config.model, dtype=getattr(torch, config.precision), head="scalar").to(self._device).eval()
        )
        self._encoder = ConversationEncoder(
            load_tokenizer(config.model),
            max_length=config.max_sequence_length,
            train_on="all",
            chat_template_kwargs=config.chat_template_kwargs,
        )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation as it was tokenised for training.

        Raises:
            DataError: The chat template refuses it.
        """
        ids: list[int] = self._encoder.batch([messages])["input_ids"].tolist()
        return ids

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The score of each sequence: the head's output at its last token.

        Args:
            sequences: At most `config.batch_size`, of one `width_of`.
        """
        rows, width = self.config.batch_size, width_of(len(sequences[0]))
        ids = torch.zeros(rows, width, dtype=torch.int64)
        mask = torch.zeros(rows, width, dtype=torch.int64)
        last = torch.zeros(rows, dtype=torch.int64)
        for row in range(rows):
            sequence = sequences[row if row < len(sequences) else 0]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
            last[row] = len(sequence) - 1
        states = self._model.base_model(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
        ).last_hidden_state
        scores = self._model.score(states[torch.arange(rows), last.to(self._device)]).squeeze(-1).float()
        return [score * self.config.scale for score in scores[: len(sequences)].tolist()]
