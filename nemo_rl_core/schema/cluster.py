"""Settings of the machines."""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, optional

__all__ = ["ClusterConfig"]


@frozen(kw_only=True)
class ClusterConfig:
    """The machines."""

    launcher: Any = "local"
    """Launcher: name, `dist:name`, `module:attr` or class."""
    options: Any = field(factory=dict, metadata={"options_of": ("launchers", "launcher")})
    """Settings of the launcher, structured by its `config_class`."""
    num_nodes: int = field(default=1, validator=ge(1))
    """Machines of the cluster."""
    gpus_per_node: int | None = field(default=None, validator=optional(ge(0)))
    """None takes what is found; 0 is CPU only."""
    cpus_per_node: int | None = field(default=None, validator=optional(ge(1)))
    """CPU cores used on each machine; None takes what is found."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run: auto is cuda if there is a GPU."""
    colocated: bool = True
    """Training and generation share devices."""
    roles: dict[str, int] = Factory(dict)
    """Devices by role when not colocated, such as `{policy: 4, generation: 4}`."""
    offload: Literal["auto", "always", "never"] = "auto"
    """Colocated models and engines take turns: the weights and optimizers wait in the host's memory while the engine
    samples, and the engine sleeps while they train. auto does so on an accelerator; always on a CPU too. Needs
    `rollouts.staleness` 0."""

    @classmethod
    def auto_detect(cls) -> ClusterConfig:
        """This machine: its CUDA devices, or its CPU cores if it has none."""
        from nemo_rl_core.machine.devices import detect_devices

        device, gpus = detect_devices()
        return cls(device=device, gpus_per_node=gpus, cpus_per_node=os.cpu_count())

    def device_type(self) -> str:
        """`device`, or what "auto" is on this machine."""
        from nemo_rl_core.machine.devices import detect_devices

        return detect_devices()[0] if self.device == "auto" else self.device
