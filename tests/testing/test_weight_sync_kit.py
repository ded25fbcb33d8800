"""The kit of weight syncs, tried on syncs that are broken in one thing each."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.weights.in_process import InProcessSync, InProcessSyncConfig
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_core.testing import WeightSyncContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses


class Impatient(WeightSyncContract):
    wait_s = 1.5  # for syncs that hang


def reporting(change):
    """A sync that reports something else: `change(report)`."""

    class Sync(InProcessSync):
        def sync(self, trainer, engine, **kwargs):
            return change(super().sync(trainer, engine, **kwargs))

    return Sync


def asked(change):
    """A sync that does something else than it is asked: `change(arguments)`."""

    class Sync(InProcessSync):
        def sync(self, trainer, engine, **kwargs):
            return super().sync(trainer, engine, **{**kwargs, **change(kwargs)})

    return Sync


class Through:
    """A trainer's group, its tensors changed on the way."""

    size = 1

    def __init__(self, group, change):
        self.group, self.change = group, change

    @property
    def local(self):
        return self.group.local

    def iterate(self, method, /, *args, timeout_s=None):
        yield from self.change(self.group.iterate(method, *args, timeout_s=timeout_s))


def sending(change):
    """A sync that sends something else than the trainer's tensors."""

    class Sync(InProcessSync):
        def sync(self, trainer, engine, **kwargs):
            return super().sync(Through(trainer, change), engine, **kwargs)

    return Sync


class WithoutCheck(InProcessSync):
    def __init__(self):
        super().__init__(InProcessSyncConfig(check_fingerprint=False))


class Simple(InProcessSync):
    """The few lines one would write first: no deadline, no check, in the caller's thread."""

    def sync(self, trainer, engine, *, version, share, timeout_s):
        tensors = [(name, tensor.to(engine.dtype)) for name, tensor in trainer.iterate("export_weights")]
        engine.update_weights(version, iter(tensors), share=share)
        size = sum(tensor.nbytes for _, tensor in tensors)
        return SyncReport(
            version=version, num_tensors=len(tensors), num_bytes=size, seconds=0.0, fingerprint=fingerprint(tensors)
        )


class NamesNoSide(InProcessSync):
    def sync(self, trainer, engine, **kwargs):
        try:
            return super().sync(trainer, engine, **kwargs)
        except DeadlineExceeded:
            raise DeadlineExceeded("the refit passed its deadline") from None


class WrapsErrors(InProcessSync):
    def sync(self, trainer, engine, **kwargs):
        try:
            return super().sync(trainer, engine, **kwargs)
        except Exception as error:
            raise RuntimeError(str(error)) from error


class WithoutConfigClass(InProcessSync):
    config_class = None


class TellsItMayShare(InProcessSync):
    """Passes `share` on without asking where the trainer is."""

    def sync(self, trainer, engine, *, share, **kwargs):
        update = engine.update_weights
        engine.update_weights = lambda version, tensors, **_: update(version, tensors, share=share)
        try:
            return super().sync(trainer, engine, share=share, **kwargs)
        finally:
            engine.update_weights = update


def cast_in_place(tensors):
    for name, tensor in tensors:
        tensor.copy_(tensor.to(torch.bfloat16))
        yield name, tensor


def without_last(tensors):
    return list(tensors)[:-1]


BROKEN = {
    "declares_its_config": (WithoutConfigClass,),
    "weights_arrive": (
        sending(without_last),
        sending(lambda tensors: ((name, tensor * 1.0001) for name, tensor in tensors)),
        sending(lambda tensors: ((f"module.{name}", tensor) for name, tensor in tensors)),
    ),
    "report": (
        reporting(lambda r: evolve(r, version=0)),
        reporting(lambda r: evolve(r, num_tensors=0)),
        reporting(lambda r: evolve(r, fingerprint="0" * 32)),
        reporting(lambda r: evolve(r, seconds=-1.0)),
        reporting(lambda r: None),
    ),
    "version": (asked(lambda a: {"version": 0}), asked(lambda a: {"version": a["version"] + 1})),
    "stale_engine": (WithoutCheck, Simple),
    "share": (asked(lambda a: {"share": True}),),
    "nothing_to_share": (TellsItMayShare, Simple),
    "num_bytes": (
        reporting(lambda r: evolve(r, num_bytes=0)),
        Simple,
        sending(lambda tensors: ((name, tensor.float() + 1) for name, tensor in tensors)),
    ),
    "trainer_is_left_alone": (sending(cast_in_place),),
    "deadline": (Simple, NamesNoSide, WrapsErrors),
    "errors": (WrapsErrors,),
}


def test_a_broken_sync_is_there_for_each_clause():
    assert set(BROKEN) == set(clauses(WeightSyncContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, syncs in BROKEN.items() for b in syncs])
def test_a_broken_sync_is_caught(clause, broken):
    (result,) = run_kit(Impatient, broken, only=[clause]).results
    assert result.outcome == "failed", f"{broken.__name__} passes {clause}"
    assert result.message
