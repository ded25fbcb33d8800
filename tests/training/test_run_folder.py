"""A run folder that the trainers do not see is told before the first step, not at the first checkpoint."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.schema import ClusterConfig
from nemo_rl_core.training.checkpoints import run_folder
from nemo_rl_core.training.checkpoints.run_folder import check_run_folder


class Trainer:
    """Sees what the driver sees, unless it has a disk of its own: then every path leads below `disk`."""

    def setup(self, disk, context):
        self.disk = disk

    def use(self, disk):
        self.disk = disk

    def apply(self, function, path, *args):
        return function(self, path if self.disk is None else f"{self.disk}{path}", *args)

    def shutdown(self):
        pass


def test_a_folder_that_trainers_do_not_see_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=1))
    spec = WorkerSpec(role="policy", factory=Trainer, config=None, own_process=True, run_dir=str(tmp_path))
    group = launcher.launch(spec)
    try:
        check_run_folder([group], Path("run"))
        group.call("use", str(tmp_path / "other"))
        with pytest.raises(ConfigError, match=rf"{tmp_path}/run is not on a disk .* on {socket.gethostname()} do not"):
            check_run_folder([group], Path("run"))
    finally:
        launcher.shutdown()
    assert list(Path("run").iterdir()) == []
