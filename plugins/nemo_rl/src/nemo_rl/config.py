"""The configuration classes of the framework and of the default algorithms."""

from __future__ import annotations

from nemo_rl_core.config import (
    CheckpointConfig,
    ClusterConfig,
    ComponentChoice,
    DataConfig,
    DatasetConfig,
    GenerationConfig,
    InvariantsConfig,
    LoggingConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    SchedulerConfig,
    ValidationConfig,
    load_config,
)
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_sft.config import SFTConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DataConfig",
    "DatasetConfig",
    "GRPOConfig",
    "GenerationConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SchedulerConfig",
    "ValidationConfig",
    "load_config",
]
