"""The connection to a Ray cluster, or one of this run's own on this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray

from nemo_rl_core.errors import ResourceError

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig
    from nemo_rl_plugins_ray.config import RayConfig

__all__ = ["Connection", "connect"]

_log = logging.getLogger(__name__)
_ADDRESS = "RAY_ADDRESS"
_CLIENT_MODE = "RAY_CLIENT_MODE"
_REACH_S = 10.0
_OLDEST = (2, 49)
_LONGEST = 30  # characters of the temporary folder's parent: Ray keeps sockets below, whose paths must be short


class Connection:
    """What has to be undone at the end.

    Args:
        owned: Whether this process connected (a script that had called `ray.init` itself stays connected).
        folder: Temporary folder of a cluster that was started here.
    """

    def __init__(self, *, owned: bool, folder: str | None = None) -> None:
        self._owned = owned
        self._folder = folder

    def close(self) -> None:
        """Disconnect, and end the cluster and remove its files if it was started here; may be called twice."""
        owned, self._owned = self._owned, False
        folder, self._folder = self._folder, None
        if owned:
            with _unchanged_process(), _quiet_output():
                ray.shutdown()
            _undo_quiet()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def connect(config: RayConfig, cluster: ClusterConfig) -> Connection:
    """Use the Ray that this process is connected to, connect to the given one, or start one here.

    Neither the environment of this process nor its signal handlers change.

    Raises:
        ResourceError: The cluster does not answer, or none is given where several machines are asked for.
    """
    if ray.is_initialized():
        return Connection(owned=False)
    address = config.address or os.environ.get(_ADDRESS)
    if address is None and cluster.num_nodes > 1:
        raise ResourceError(
            f"cluster.num_nodes is {cluster.num_nodes}, but no Ray cluster is given. Start Ray on the machines (`ray "
            f"start`), then set {_ADDRESS} or cluster.options.address to the head's host:port (auto on the head)."
        )
    if address is not None:
        _check_address(address)
    _be_quiet()
    if address is not None:
        _init(f"Cannot reach the Ray cluster at {address!r} (`ray status` shows whether it runs)", config, address)
        return Connection(owned=True)
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="nemo-ray-", dir=parent if len(parent) <= _LONGEST else "/tmp")
    try:
        _init("Ray did not start on this machine", config, None, **_own_cluster(config, cluster, folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Connection(owned=True, folder=folder)


def _check_address(address: str) -> None:
    """Ray itself tries an address where nobody listens for minutes.

    Raises:
        ResourceError: It is of another kind, or nobody listens there.
    """
    if "://" in address:
        raise ResourceError(
            f"The Ray address {address!r} is one of a dashboard or of a Ray client. Run on the cluster itself (`ray "
            "job submit -- nemo-rl train ...`), or give the host:port of its head (`ray start` prints it)."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # auto, local: Ray finds out at once
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ResourceError(
            f"Cannot reach the Ray cluster at {address!r}: {error}. `ray status` on its head shows whether it runs; "
            "the address comes from cluster.options.address or RAY_ADDRESS."
        ) from None


def _own_cluster(config: RayConfig, cluster: ClusterConfig, folder: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_cpus": cluster.cpus_per_node or os.cpu_count() or 1,
        "include_dashboard": False,
        "_temp_dir": folder,
    }
    if cluster.device == "cpu":
        settings["num_gpus"] = 0
    elif cluster.gpus_per_node is not None:
        settings["num_gpus"] = cluster.gpus_per_node
    if config.object_store_gib is not None:
        settings["object_store_memory"] = int(config.object_store_gib * 2**30)
    return settings


def _init(failure: str, config: RayConfig, address: str | None, **settings: Any) -> None:
    with _unchanged_process(), _quiet_output() as said:
        try:
            ray.init(
                address=address or "local",
                namespace=config.namespace,
                log_to_driver=False,
                configure_logging=False,
                **settings,
            )
        except Exception as error:  # Ray raises bare ones, such as for a node that is slow to start
            if ray.is_initialized():
                ray.shutdown()
            _check_versions(str(error))
            notes = said.getvalue().strip()
            raise ResourceError(
                f"{failure}: {type(error).__name__}: {error}" + (f"\n{notes}" if notes else "")
            ) from None


def _check_versions(words: str) -> None:
    """Say it better than Ray where the cluster's versions are not this process's.

    Raises:
        ResourceError: They differ; names both and the way out.
    """
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", words)
    if "Version mismatch" not in words or len(versions) != 2:
        return
    (theirs, their_python), (ours, our_python) = versions
    if theirs == ours:
        fix = f"Run with Python {their_python} here, or start the cluster with Python {our_python} on every machine."
    elif tuple(map(int, re.findall(r"\d+", theirs)[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        fix = f"nemo-rl-ray needs Ray {oldest} or newer: `pip install 'ray=={ours}'` on the machines of the cluster."
    else:
        fix = f"`pip install 'ray=={theirs}'` here, or `pip install 'ray=={ours}'` on every machine of the cluster."
    raise ResourceError(
        f"The Ray cluster runs Ray {theirs} on Python {their_python}, this process has Ray {ours} on Python "
        f"{our_python}; they must be the same. {fix}"
    ) from None


# -- keeping quiet -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Undo what `ray.init` does to the environment variables and the handler of SIGTERM."""
    before = dict(os.environ)
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if here else None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        if os.environ.get(_CLIENT_MODE) == "0":  # the default, which `import ray` writes there
            del os.environ[_CLIENT_MODE]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _quiet_output() -> Iterator[io.StringIO]:
    """Hold back the notices that Ray prints, so that `--json` stays JSON; they are told if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


_kept: dict[str, Any] = {}


def _be_quiet() -> None:
    """Send what Ray prints of dead processes to the log: the error that is raised says it better."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray._private import worker

    if "print" not in _kept and hasattr(worker, "print_to_stdstream"):
        _kept["print"] = worker.print_to_stdstream
        worker.print_to_stdstream = lambda data, *_, **__: _log.debug("%s", "\n".join(map(str, data.get("lines", ()))))


def _undo_quiet() -> None:
    from ray._private import worker

    if "print" in _kept:
        worker.print_to_stdstream = _kept.pop("print")
