"""vLLM's pieces, filled from the weight syncs: a sync's few buffers come round again before a piece is full."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.infra.weights.fingerprint import Fingerprint
from nemo_rl_core.infra.workers.local import InProcessGroup
from nemo_rl_core.testing.conformance.weight_sync import SyncedEngine, SyncedTrainer
from nemo_rl_plugins_vllm.pieces import open_piece, pack
from nemo_rl_plugins_weight_syncs.collective import CollectiveSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig, DeltaConfig, SharedMemoryConfig
from nemo_rl_plugins_weight_syncs.delta import DeltaSync
from nemo_rl_plugins_weight_syncs.shared_memory import SharedMemorySync

SYNCS = {
    "shared_memory": lambda: SharedMemorySync(SharedMemoryConfig(chunk_bytes=2500)),
    "collective": lambda: CollectiveSync(CollectiveConfig(chunk_bytes=2500)),
    "delta": lambda: DeltaSync(DeltaConfig(chunk_bytes=2500)),
}


class Trainer(SyncedTrainer):
    def __init__(self):
        super().__init__()
        self.weights = {f"layer.{i}": torch.randn(16, 16 + i) for i in range(24)}  # 1 to 2.5 KB each


class Engine(SyncedEngine):
    """Loads as vLLM's backend does: pieces on one side, its worker's receiver on the other."""

    num_pieces = 0

    def update_weights(self, version, tensors, *, share=False):
        digest, self.weights = Fingerprint(), {}
        for piece in pack(tensors, None, chunk_bytes=12_000, cuda_ipc=False):
            self.num_pieces += 1
            for name, _, tensor in open_piece(**piece.update_info(), device=torch.device("cpu")):
                digest.add(name, tensor)
                self.weights[name] = tensor.clone()
            piece.close()
        self.digest = digest.hexdigest()

    def fingerprint(self):
        return self.digest


@pytest.mark.parametrize("name", SYNCS)
def test_pieces_hold_what_a_sync_brought(name):
    sync, trainer, engine = SYNCS[name](), Trainer(), Engine()
    for version in (1, 2):
        sync.sync(InProcessGroup(trainer), engine, version=version, share=False, timeout_s=20.0)
        assert all(torch.equal(engine.weights[name], tensor) for name, tensor in trainer.weights.items())
        trainer.train()
    assert engine.num_pieces >= 6
