"""Typed configuration: classes, loading, errors, difference, reference.

The classes are imported at once; the functions, with YAML and cattrs behind them, when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.exports import lazy_exports
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
    RolloutRunConfig,
    RunConfig,
    SchedulerConfig,
    ValidationConfig,
    component,
)

if TYPE_CHECKING:
    from nemo_rl_core.config.components import Resolver, resolve_choice
    from nemo_rl_core.config.derived import ArithmeticRow, arithmetic
    from nemo_rl_core.config.describing.dump import Difference, diff, to_dict, to_yaml
    from nemo_rl_core.config.describing.reference import FieldRow, describe, json_schema
    from nemo_rl_core.config.load import finalize, load_config
    from nemo_rl_core.schema.mistakes import InvalidConfig, Mistake, Position, mistake

__all__ = [
    "ArithmeticRow",
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DataConfig",
    "DatasetConfig",
    "Difference",
    "EvaluationConfig",
    "FieldRow",
    "GenerationConfig",
    "InvalidConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "Mistake",
    "OptimizerConfig",
    "PolicyConfig",
    "Position",
    "Resolver",
    "RolloutConfig",
    "RolloutRunConfig",
    "RunConfig",
    "SchedulerConfig",
    "ValidationConfig",
    "arithmetic",
    "component",
    "describe",
    "diff",
    "finalize",
    "json_schema",
    "load_config",
    "mistake",
    "resolve_choice",
    "to_dict",
    "to_yaml",
]

_HOMES = {
    "ArithmeticRow": ".derived",
    "Difference": ".dump",
    "FieldRow": ".reference",
    "InvalidConfig": ".mistakes",
    "Mistake": ".mistakes",
    "Position": ".mistakes",
    "Resolver": ".components",
    "arithmetic": ".derived",
    "describe": ".reference",
    "diff": ".dump",
    "finalize": ".load",
    "json_schema": ".reference",
    "load_config": ".load",
    "mistake": ".mistakes",
    "resolve_choice": ".components",
    "to_dict": ".dump",
    "to_yaml": ".dump",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
