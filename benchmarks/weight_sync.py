"""How fast weights move from a trainer to an engine in another process, as a share of a plain memory copy.

The trainer and the engine are worker processes of the local launcher that hold tensors of a transformer's shapes and
do nothing else, so that what is timed is the sync: export, transfer, load. The yardstick is `Tensor.copy_` of the same
tensors inside one process, taken before every refit of the same run. Every sync is timed with and without the
comparison of fingerprints, for which each side sums all weights once more, a chunk at a time. Bar: 0.5 of the copy's
bandwidth where both are on one machine, for `shared_memory`.

On a busy machine the wall clock measures who else is there: the two processes of a sync take turns and wait for a core
at each, the plain copy does not. So the CPU time stands beside it: that of the copy over that of the busier side, which
is what the wall clock would say with a core for each.

`delta` is measured in bytes: at 3 % changed elements it must send at least 5 times fewer than the weights have.

    python benchmarks/weight_sync.py [--megabytes 256] [--rounds 5] [--output benchmarks/results/weight_sync.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.infra.weights.fingerprint import CachedSums
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.schema import ClusterConfig, GenerationConfig
from nemo_rl_plugins_weight_syncs.collective import CollectiveSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig, DeltaConfig, DiskConfig, SharedMemoryConfig
from nemo_rl_plugins_weight_syncs.delta import DeltaSync
from nemo_rl_plugins_weight_syncs.disk import DiskSync
from nemo_rl_plugins_weight_syncs.shared_memory import SharedMemorySync

BANDWIDTH_BAR = 0.5
BYTES_BAR = 5.0
CHANGED = 0.03
_HIDDEN, _FFN, _VOCAB = 1024, 3072, 16384


def weights(megabytes: int) -> dict[str, Tensor]:
    """Bfloat16 tensors of a transformer's shapes, about so many megabytes together."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (_VOCAB, _HIDDEN)}
    size = layer = 0
    while size < megabytes << 20:
        shapes |= {
            f"{layer}.qkv": (3 * _HIDDEN, _HIDDEN),
            f"{layer}.o": (_HIDDEN, _HIDDEN),
            f"{layer}.norm": (_HIDDEN,),
        }
        shapes |= {f"{layer}.up": (2 * _FFN, _HIDDEN), f"{layer}.down": (_HIDDEN, _FFN)}
        size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
        layer += 1
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


class Trainer:
    """Exports its weights and changes a share of them."""

    def setup(self, config: int, context: Any) -> None:
        """Make the weights."""
        torch.set_num_threads(1)
        self.weights = weights(config)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The live tensors."""
        yield from self.weights.items()

    def apply(self, function: Any, *args: Any) -> Any:
        """As a training backend has it."""
        return function(self, *args)

    def change(self, share: float) -> int:
        """Flip the lowest bit of a random share of the elements; their number."""
        count = 0
        for tensor in self.weights.values():
            chosen = torch.rand(tensor.shape) < share
            bits = tensor.view(torch.int16)
            bits[chosen] ^= 1
            count += int(chosen.sum())
        return count

    def cpu_seconds(self) -> float:
        """CPU time of this process."""
        return time.process_time()

    def shutdown(self) -> None:
        """Nothing is held."""


def cpu_seconds(engine: Any) -> float:
    """CPU time of an engine's process."""
    return time.process_time()


def set_digests(engine: Any, digests: bool) -> None:
    """Whether an engine takes its parameters' sums when it loads them."""
    engine.digests = digests


class Engine(GenerationBackend):
    """Copies what it is given into its parameters, as `torch_engine` does.

    Attributes:
        digests: It will be asked for a digest, and takes the sums of what it loads.
    """

    digests = False
    config_class: ClassVar[type] = dict
    dtype = torch.bfloat16

    def setup(self, config: GenerationConfig, context: Any) -> None:
        """Make parameters to copy into."""
        torch.set_num_threads(1)
        self.parameters = {name: torch.zeros_like(t) for name, t in weights(int(config.model_name or 0)).items()}

    async def generate(self, request: GenerationRequest) -> Completion:
        """It has nothing to say."""
        raise NotImplementedError

    def update_weights(self, version: int, tensors: Any, *, share: bool = False) -> None:
        """Copy in place."""
        self.sums = CachedSums()
        for name, tensor in tensors:
            self.parameters[name].copy_(tensor)
            if self.digests:
                self.sums.add(name, self.parameters[name])

    def fingerprint(self) -> str:
        """Of the parameters."""
        return self.sums.fingerprint(self.parameters.items())


def plain_copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[float, float]:
    """Wall and CPU seconds of copying all tensors inside this process."""
    started, cpu = time.perf_counter(), time.thread_time()
    for name, tensor in source.items():
        target[name].copy_(tensor)
    return time.perf_counter() - started, time.thread_time() - cpu


def syncs(check: bool, folder: str) -> dict[str, Any]:
    """Every sync by name."""
    return {
        "shared_memory": SharedMemorySync(SharedMemoryConfig(check_fingerprint=check)),
        "collective": CollectiveSync(CollectiveConfig(check_fingerprint=check)),
        "delta": DeltaSync(DeltaConfig(check_fingerprint=check)),
        "disk": DiskSync(DiskConfig(check_fingerprint=check, folder=folder)),
    }


def measure(megabytes: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, and the ratios."""
    torch.set_num_threads(1)
    source = weights(megabytes)
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    num_bytes = sum(tensor.nbytes for tensor in source.values())
    with tempfile.TemporaryDirectory() as folder:
        launcher = LocalLauncher()
        launcher.setup(ClusterConfig(device="cpu", cpus_per_node=max(2, os.cpu_count() or 2)))
        trainer = launcher.launch(
            WorkerSpec(role="policy", factory=Trainer, config=megabytes, own_process=True, run_dir=folder)
        )
        host = HostConfig(engine=Engine, generation=GenerationConfig(model_name=str(megabytes)))
        spec = WorkerSpec(role="generation", factory=EngineHost, config=host, own_process=True, run_dir=folder)
        engines = EngineWorkers.start(lambda index: launcher.launch(spec), num_workers=1)
        try:
            result = {"num_bytes": num_bytes, "rounds": rounds, "changed_share": CHANGED}
            plain_copy(source, target)
            for check in (False, True):
                engines.apply(set_digests, check)
                for name, sync in syncs(check, folder).items():
                    key = f"{name}_checked" if check else name
                    result[key] = _time(sync, trainer, engines, lambda: plain_copy(source, target), rounds, num_bytes)
                    print(f"{key:24} {json.dumps(result[key])}", flush=True)
        finally:
            engines.shutdown()
            launcher.shutdown()
    return result


def _time(sync: Any, trainer: Any, engines: Any, copy: Any, rounds: int, num_bytes: int) -> dict[str, float]:
    """The first refit makes buffers and groups; it is not counted."""
    sync.sync(trainer, engines, version=0, share=False, timeout_s=300)
    seconds, copies, sent, busy, copies_cpu = [], [], [], [], []
    for version in range(1, rounds + 1):
        trainer.call("change", CHANGED)
        wall, cpu = copy()
        copies.append(wall)
        copies_cpu.append(cpu)
        before = [*trainer.call("cpu_seconds"), *engines.apply(cpu_seconds)]
        report = sync.sync(trainer, engines, version=version, share=False, timeout_s=300)
        after = [*trainer.call("cpu_seconds"), *engines.apply(cpu_seconds)]
        busy.append(max(late - early for late, early in zip(after, before, strict=True)))
        seconds.append(report.seconds)
        sent.append(report.num_bytes if report.num_bytes_sent is None else report.num_bytes_sent)
    ratios = [mine / other for mine, other in zip(copies, seconds, strict=True)]
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_best": min(seconds),
        "plain_copy_seconds_median": statistics.median(copies),
        "share_of_copy_bandwidth_median": statistics.median(ratios),
        "share_of_copy_bandwidth_best": min(copies) / min(seconds),
        "cpu_seconds_of_busier_side_median": statistics.median(busy),
        "plain_copy_cpu_seconds_median": statistics.median(copies_cpu),
        "share_of_copy_bandwidth_by_cpu": statistics.median(copies_cpu) / statistics.median(busy),
        "bytes_ratio": num_bytes / statistics.median(sent),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    machine = {"cpu_count": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    result = {
        "machine": {**machine, "load_1m": os.getloadavg()[0]},
        "bandwidth_bar": BANDWIDTH_BAR,
        "bytes_bar": BYTES_BAR,
        **measure(arguments.megabytes, arguments.rounds),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
