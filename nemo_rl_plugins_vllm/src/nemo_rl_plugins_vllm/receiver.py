"""The end of a refit inside vLLM's workers: a weight transfer engine that loads pieces, and digests them.

vLLM makes one in every worker. The trainer's tensors have Hugging Face names and full shapes; vLLM's loader cuts,
fuses and repacks them, each layer when all of it has come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from nemo_rl_core.infra.weights.fingerprint import Fingerprint, fingerprint
from nemo_rl_plugins_vllm.cpu import forget_expert_kernels, keep_expert_kernels, repack_tied_heads
from nemo_rl_plugins_vllm.pieces import open_piece

__all__ = ["ReceivedPiece", "ReceiverInit", "WeightReceiver"]

# At every update it warns of each layer that has no weights of its own (rotary embeddings, a tied head). That all
# weights come is checked by name before they are sent.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class ReceiverInit(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class ReceivedPiece(WeightTransferUpdateInfo):
    """`Piece.update_info` of the sender."""

    kind: str
    where: Any
    num_bytes: int
    tensors: list[Any] = field(default_factory=list)


class WeightReceiver(WeightTransferEngine[ReceiverInit, ReceivedPiece]):
    """Loads what the trainer sends, and keeps a digest of it."""

    init_info_cls = ReceiverInit
    update_info_cls = ReceivedPiece
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._digest: Fingerprint | None = None
        self._received: str | None = None
        self._loaded: str | None = None
        self._kernels: list[Any] = []

    def init_transfer_engine(self, init_info: ReceiverInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Begin with the first piece."""
        self._received = self._loaded = None
        self._digest = Fingerprint()
        if self.device.type == "cpu":
            self._kernels = forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a piece; on return the sender may give its memory back."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: ReceivedPiece) -> None:
        """Load a piece."""
        assert self._digest is not None, "start_weight_update comes first"
        weights = []
        piece = update_info
        for name, load_name, tensor in open_piece(
            piece.kind, piece.where, piece.num_bytes, piece.tensors, device=self.device
        ):
            self._digest.add(name, tensor)
            weights.append((load_name, tensor))
        with disable_mtp_completeness_check():
            self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        """Put the last layers together, and note what was received and what became of it."""
        assert self._digest is not None, "start_weight_update comes first"
        self._finalize()
        if self.device.type == "cpu":
            repack_tied_heads(self.model)
        self._received, self._digest = self._digest.hexdigest(), None
        self._loaded = self._model_digest()

    def abandon(self) -> None:
        """Leave a broken update; the model holds a mixture then, until the next one is through."""
        if self._digest is not None:
            self._digest = None
            self._finalize()

    def _finalize(self) -> None:
        kernels, self._kernels = self._kernels, []
        try:
            finalize_layerwise_reload(self.model, self.model_config)
        finally:
            keep_expert_kernels(kernels)

    def fingerprint(self) -> str | None:
        """Digest of the tensors of the last update; None if there was none, or it did not finish.

        Raises:
            RuntimeError: The model's parameters have changed since that update.
        """
        if self._received is not None and self._model_digest() != self._loaded:
            raise RuntimeError("the model's parameters are not those that the last weight update left")
        return self._received

    def _model_digest(self) -> str:
        """Of the parameters as vLLM keeps them (cut, fused and repacked)."""
        return fingerprint((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def shutdown(self) -> None:
        """Nothing to release."""
