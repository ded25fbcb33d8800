"""Tools for a plugin's own tests: conformance kits, fakes, and a site of small distributions.

The contracts are named `<Kind>Contract` and are imported when first asked for; they need pytest, which the extra
`testing` installs. With it, pytest has the fixtures of `nemo_rl_core.testing.pytest_plugin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.exports import lazy_exports

if TYPE_CHECKING:
    from nemo_rl_core.testing.conformance.advantage import AdvantageContract
    from nemo_rl_core.testing.conformance.algorithm import AlgorithmContract
    from nemo_rl_core.testing.conformance.callback import CallbackContract
    from nemo_rl_core.testing.conformance.cases.algorithm_case import AlgorithmCase
    from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
    from nemo_rl_core.testing.conformance.dataset import BrokenSource, DatasetContract
    from nemo_rl_core.testing.conformance.environment import EnvironmentContract
    from nemo_rl_core.testing.conformance.exporter import ExporterContract
    from nemo_rl_core.testing.conformance.frame.kit import (
        ClauseResult,
        Contract,
        KitReport,
        check_component,
        contract_for,
        run_kit,
    )
    from nemo_rl_core.testing.conformance.frame.subject import Configured
    from nemo_rl_core.testing.conformance.generation_backend import GenerationBackendContract
    from nemo_rl_core.testing.conformance.launcher import LauncherContract
    from nemo_rl_core.testing.conformance.logger import LoggerContract
    from nemo_rl_core.testing.conformance.loss import LossContract
    from nemo_rl_core.testing.conformance.reward import RewardContract
    from nemo_rl_core.testing.conformance.sandbox import SandboxContract
    from nemo_rl_core.testing.conformance.training_backend import TrainingBackendContract
    from nemo_rl_core.testing.conformance.weight_sync import WeightSyncContract
    from nemo_rl_core.testing.scripted_generation import ScriptedGeneration, ScriptedReply
    from nemo_rl_core.testing.site import PluginSite

__all__ = [
    "AdvantageContract",
    "AlgorithmCase",
    "AlgorithmContract",
    "BrokenSource",
    "CallbackContract",
    "ClauseResult",
    "Configured",
    "Contract",
    "DatasetContract",
    "EnvironmentCase",
    "EnvironmentContract",
    "ExporterContract",
    "GenerationBackendContract",
    "KitReport",
    "LauncherContract",
    "LoggerContract",
    "LossContract",
    "PluginSite",
    "RewardContract",
    "SandboxContract",
    "ScriptedGeneration",
    "ScriptedReply",
    "TrainingBackendContract",
    "WeightSyncContract",
    "check_component",
    "contract_for",
    "run_kit",
]

_HOMES = {
    "AdvantageContract": ".conformance.advantage",
    "AlgorithmCase": ".conformance.cases.algorithm_case",
    "AlgorithmContract": ".conformance.algorithm",
    "BrokenSource": ".conformance.dataset",
    "CallbackContract": ".conformance.callback",
    "ClauseResult": ".conformance.frame.kit",
    "Configured": ".conformance.frame.subject",
    "Contract": ".conformance.frame.kit",
    "DatasetContract": ".conformance.dataset",
    "EnvironmentCase": ".conformance.cases.environment_case",
    "EnvironmentContract": ".conformance.environment",
    "ExporterContract": ".conformance.exporter",
    "GenerationBackendContract": ".conformance.generation_backend",
    "KitReport": ".conformance.frame.kit",
    "LauncherContract": ".conformance.launcher",
    "LoggerContract": ".conformance.logger",
    "LossContract": ".conformance.loss",
    "PluginSite": ".site",
    "RewardContract": ".conformance.reward",
    "SandboxContract": ".conformance.sandbox",
    "ScriptedGeneration": ".scripted_generation",
    "ScriptedReply": ".scripted_generation",
    "TrainingBackendContract": ".conformance.training_backend",
    "WeightSyncContract": ".conformance.weight_sync",
    "check_component": ".conformance.frame.kit",
    "contract_for": ".conformance.frame.kit",
    "run_kit": ".conformance.frame.kit",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
