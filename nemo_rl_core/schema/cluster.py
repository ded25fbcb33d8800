"""Settings of the cluster: machines, devices and launcher."""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, optional

__all__ = ["ClusterConfig"]


@frozen(kw_only=True)
class ClusterConfig:
    """Machines and devices of the run."""

    launcher: Any = "local"
    """Launcher that starts the workers: name, `dist:name`, `module:attr` or class."""
    options: Any = field(factory=dict, metadata={"options_of": ("launchers", "launcher")})
    """Settings of the launcher, structured by its `config_class`."""
    num_nodes: int = field(default=1, validator=ge(1))
    """Number of machines."""
    gpus_per_node: int | None = field(default=None, validator=optional(ge(0)))
    """GPUs to use on each machine. None uses all that are found; 0 uses CPUs only."""
    cpus_per_node: int | None = field(default=None, validator=optional(ge(1)))
    """CPU cores to use on each machine. None uses all that are found."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Type of device for the models. auto means cuda if there is a GPU."""
    colocated: bool = True
    """Whether training and generation share devices."""
    roles: dict[str, int] = Factory(dict)
    """Devices by role if not colocated, such as `{policy: 4, generation: 4}`."""
    offload: Literal["auto", "always", "never"] = "auto"
    """Whether colocated models and engines take turns: weights and optimizers wait in the host's memory while the
    engine samples, and the engine sleeps while the models train. auto does so on an accelerator, always on a CPU too.
    Requires `rollouts.staleness` 0."""

    @classmethod
    def auto_detect(cls) -> ClusterConfig:
        """Describe this machine: its CUDA devices, or its CPU cores if it has none."""
        from nemo_rl_core.machine.devices import detect_devices

        device, gpus = detect_devices()
        return cls(device=device, gpus_per_node=gpus, cpus_per_node=os.cpu_count())

    def device_type(self) -> str:
        """Return `device`, with "auto" resolved for this machine."""
        from nemo_rl_core.machine.devices import detect_devices

        return detect_devices()[0] if self.device == "auto" else self.device
