"""The weight sync `disk`: safetensors files in a folder that trainer and engines see.

Rank 0 writes a version into a folder of another name and renames it when all of it is there, so that no engine reads
half a version. The files stay readable by anything that reads safetensors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from nemo_rl_core.errors import CheckpointError, ConfigError
from nemo_rl_core.infra.weights.transfer import OutgoingWeights
from nemo_rl_core.machine.publish import published
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_plugins_weight_syncs.base import WorkerSync, conclude
from nemo_rl_plugins_weight_syncs.config import DiskConfig
from nemo_rl_plugins_weight_syncs.packing import chunks
from nemo_rl_plugins_weight_syncs.peers import RefitPeers
from nemo_rl_plugins_weight_syncs.streaming import Received, Sent, Transfer

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.training_backend import TrainingBackend


__all__ = ["DiskSync"]

_INDEX = "refit.json"


class DiskSync(WorkerSync):
    """Weights through files.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = DiskConfig

    def __init__(self, config: DiskConfig | None = None) -> None:
        self.config = config or DiskConfig()
        self._session = uuid.uuid4().hex[:12]
        self._own: Path | None = None

    def _attempt(self, peers: RefitPeers, start: float) -> SyncReport:
        folder, version = self._folder(peers), peers.deadline.version
        transfer = Transfer(
            session=self._session,
            version=version,
            timeout_s=peers.deadline.remaining(),
            chunk_bytes=self.config.shard_bytes,
            dtype=getattr(peers.engine, "dtype", None),
            fingerprint=self.config.check_fingerprint,
        )
        # A name of its own for every attempt: one that was given up may still be writing.
        target = folder / f"weights-v{version}-{uuid.uuid4().hex[:8]}"
        sent = peers.trainer(_write, (transfer, target, self.config.keep))[0]
        received = peers.engines(_read, [(transfer, target)] * len(peers.engine_names))
        return conclude([sent] * len(received), received, peers.engine_names, transfer, start=start)

    def _folder(self, peers: RefitPeers) -> Path:
        """That of this session; it goes with this object, at the end of the run at the latest."""
        if self.config.folder is not None:
            if self._own is None:
                self._own = self._removed_at_end(Path(self.config.folder).absolute() / f"refits-{self._session}")
            return self._own
        trainers, there = peers.places()
        here = trainers[0]
        elsewhere = sorted({place.host for place in there if place.machine != here.machine})
        if elsewhere:
            raise ConfigError(
                f"weight_sync: disk without a folder uses a temporary one of the trainer's machine {here.host}, which "
                f"the engines on {', '.join(elsewhere)} do not see. Set weight_sync.options.folder to a shared one."
            )
        if self._own is None:
            self._own = self._removed_at_end(Path(tempfile.mkdtemp(prefix="nemo-rl-refits-")))
        return self._own

    def _removed_at_end(self, folder: Path) -> Path:
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder


def _write(backend: TrainingBackend, rank: int, transfer: Transfer, target: Path, keep: int) -> Sent | None:
    """On every rank of the trainer: export; on rank 0 write a version and remove old ones."""
    source = iter(backend.export_weights())
    if rank != 0:
        for _ in source:
            pass
        return None
    try:
        return _write_version(source, transfer, target, keep)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"Cannot write the weights of version {transfer.version} to {target}: {error}. Check free space and rights."
        ) from error
    finally:
        for _ in source:  # the other ranks export on: a collective is never left half way
            pass


def _write_version(source: Iterator[tuple[str, Tensor]], transfer: Transfer, target: Path, keep: int) -> Sent:
    """Write tensors [...] as one version, which appears in its place when it is whole."""
    outgoing = OutgoingWeights(source, transfer.dtype)
    with published(target) as unfinished:
        unfinished.mkdir(parents=True)
        digest = _write_files(unfinished, outgoing, transfer)
    _remove_old(target, keep)
    return Sent(num_tensors=outgoing.num_tensors, num_bytes=outgoing.num_bytes, num_bytes_sent=None, fingerprint=digest)


def _write_files(unfinished: Path, outgoing: OutgoingWeights, transfer: Transfer) -> str:
    """Write all of a version; its digest."""
    from safetensors.torch import save_file

    files = []
    for number, chunk in enumerate(chunks(outgoing, transfer.chunk_bytes)):
        tensors = {e.name: t.contiguous() for e, t in zip(chunk.entries, chunk.tensors, strict=True)}
        files.append(f"weights-{number:05d}.safetensors")
        save_file(tensors, unfinished / files[-1], metadata={"format": "pt", "version": str(transfer.version)})
    digest = outgoing.digest.hexdigest()
    index = {"version": transfer.version, "fingerprint": digest, "files": files}
    (unfinished / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return digest


def _remove_old(newest: Path, keep: int) -> None:
    folders = sorted(newest.parent.glob("weights-v*"), key=lambda path: path.stat().st_mtime)
    old = [path for path in folders if path != newest][: max(0, len(folders) - keep)]
    for path in [*old, *newest.parent.glob(".weights-v*.unfinished")]:  # of a trainer that was killed
        shutil.rmtree(path, ignore_errors=True)


def _read(engine: GenerationBackend, transfer: Transfer, target: Path) -> Received:
    """In an engine's process: load a version."""
    engine.update_weights(transfer.version, _tensors(target), share=False)
    return Received(fingerprint=engine.fingerprint() if transfer.fingerprint else None)


def _tensors(target: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors [...] of a version, file by file."""
    from safetensors import SafetensorError, safe_open

    try:
        index = json.loads((target / _INDEX).read_text(encoding="utf-8"))
        for name in index["files"]:
            with safe_open(target / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    yield key, file.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read the weights of the refit in {target}: {error}. Is the folder the same for trainer and engine?"
        ) from error
