"""Every sync keeps the contract of its kind, with trainer and engine in this process."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import WeightSyncContract
from nemo_rl_plugins_weight_syncs.collective import CollectiveSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig, DeltaConfig, DiskConfig, SharedMemoryConfig
from nemo_rl_plugins_weight_syncs.delta import DeltaSync
from nemo_rl_plugins_weight_syncs.disk import DiskSync
from nemo_rl_plugins_weight_syncs.shared_memory import SharedMemorySync


class TestSharedMemory(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self):
        return SharedMemorySync()


class TestSharedMemoryInSmallChunks(WeightSyncContract):
    """Every tensor is a chunk of its own, and each is larger than the buffer asked for."""

    @pytest.fixture
    def weight_sync(self):
        return SharedMemorySync(SharedMemoryConfig(chunk_bytes=16))


class TestCollective(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self):
        return CollectiveSync()


class TestCollectiveInSmallChunks(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self):
        return CollectiveSync(CollectiveConfig(chunk_bytes=16))


class TestDelta(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self):
        return DeltaSync(DeltaConfig(chunk_bytes=600))


class TestDisk(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self, tmp_path):
        return DiskSync(DiskConfig(folder=str(tmp_path), shard_bytes=600))
