"""Configuration classes, one module for each part of a run. A default is written on its field and nowhere else."""

from nemo_rl_core.schema.choice import ComponentChoice, component
from nemo_rl_core.schema.cluster import ClusterConfig
from nemo_rl_core.schema.data import DataConfig, DatasetConfig
from nemo_rl_core.schema.generation import GenerationConfig
from nemo_rl_core.schema.mistakes import InvalidConfig, Mistake, Position, mistake
from nemo_rl_core.schema.model import OptimizerConfig, PolicyConfig, SchedulerConfig
from nemo_rl_core.schema.rollouts import RolloutConfig
from nemo_rl_core.schema.run import (
    CheckpointConfig,
    EvaluationConfig,
    InvariantsConfig,
    LoggingConfig,
    RolloutRunConfig,
    RunConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DataConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "InvalidConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "Mistake",
    "OptimizerConfig",
    "PolicyConfig",
    "Position",
    "RolloutConfig",
    "RolloutRunConfig",
    "RunConfig",
    "SchedulerConfig",
    "ValidationConfig",
    "component",
    "mistake",
]
