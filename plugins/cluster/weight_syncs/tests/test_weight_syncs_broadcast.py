"""A broadcast that nobody takes: when it is given up, and what becomes of its group."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_plugins_weight_syncs import collective
from nemo_rl_plugins_weight_syncs.hub import RefitDeadline


class CountsFromTheStart:
    """A work as NCCL has it: the time that it may take is counted from its start."""

    def __init__(self, work):
        self.work, self.asked = work, []

    def wait(self, timeout):
        self.asked.append(timeout.total_seconds())
        self.work.wait(datetime.timedelta(seconds=0.01))

    def is_completed(self):
        return self.work.is_completed()


class Aborted:
    """A group of gloo that notes what NCCL's would do."""

    def __init__(self, inner):
        self.inner, self.aborted = inner, 0

    def broadcast(self, tensors, options):
        return CountsFromTheStart(self.inner.broadcast(tensors, options))

    def abort(self):
        self.aborted += 1


@pytest.fixture
def groups(tmp_path, monkeypatch):
    def make(store, rank, size):
        return Aborted(collective._gloo(store, rank, size, datetime.timedelta(seconds=1), local=True))

    def join(rank):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        return collective._Group("nccl", store, rank, 2, timeout=None, local=True)

    monkeypatch.setattr(collective, "_nccl", make)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(join, (0, 1)))


def test_an_nccl_broadcast_has_the_deadline_of_its_refit_and_is_aborted(groups, monkeypatch):
    inner = groups[0].inner
    started = groups[0].broadcast(torch.zeros(64 << 20, dtype=torch.uint8))
    started.started -= 100.0  # it was started long ago, as one that an engine lets come early
    with pytest.raises(DeadlineExceeded, match="waiting for the engines"):
        started.wait(RefitDeadline(0.0, 7), "the engines")
    (asked,) = started.work.asked
    assert 100.0 <= asked < 101.0
    groups[0].close()
    groups[1].close()
    assert inner.aborted == 1 and groups[0].inner is None


def test_a_group_with_nothing_under_way_is_not_aborted(groups):
    inner = groups[0].inner
    with ThreadPoolExecutor(2) as pool:
        buffers = [torch.full((10,), float(rank + 1)) for rank in (0, 1)]
        for started in pool.map(lambda pair: pair[0].broadcast(pair[1]), zip(groups, buffers, strict=True)):
            started.work.work.wait(datetime.timedelta(seconds=10))
    assert buffers[1].tolist() == [1.0] * 10
    for group in groups:
        group.close()
    assert inner.aborted == 0
