"""Configuration classes of the framework and of the default algorithms."""

from __future__ import annotations

from nemo_rl_core.config import load_config
from nemo_rl_core.schema import (
    CheckpointConfig,
    ClusterConfig,
    ComponentChoice,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    GenerationConfig,
    InvariantsConfig,
    LoggingConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    SchedulerConfig,
    ValidationConfig,
)
from nemo_rl_plugins_distillation.config import DistillationConfig
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_grpo.presets import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GSPOConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from nemo_rl_plugins_ppo.config import PPOConfig
from nemo_rl_plugins_sft.config import SFTConfig

__all__ = [
    "CISPOConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DAPOConfig",
    "DataConfig",
    "DatasetConfig",
    "DistillationConfig",
    "DrGRPOConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "GSPOConfig",
    "GenerationConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PolicyConfig",
    "RLOOConfig",
    "ReinforcePPConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SchedulerConfig",
    "ValidationConfig",
    "load_config",
]
