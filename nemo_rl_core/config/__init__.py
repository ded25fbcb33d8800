"""Configuration: files and overrides to the classes of `schema`, differences, descriptions.

The functions, with YAML and cattrs behind them, are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.exports import lazy_exports

if TYPE_CHECKING:
    from nemo_rl_core.config.components import Resolver, resolve_choice
    from nemo_rl_core.config.derived import ArithmeticRow, arithmetic
    from nemo_rl_core.config.describing.dump import Difference, diff, to_dict, to_yaml
    from nemo_rl_core.config.describing.reference import FieldRow, describe, json_schema
    from nemo_rl_core.config.load import finalize, load_config

__all__ = [
    "ArithmeticRow",
    "Difference",
    "FieldRow",
    "Resolver",
    "arithmetic",
    "describe",
    "diff",
    "finalize",
    "json_schema",
    "load_config",
    "resolve_choice",
    "to_dict",
    "to_yaml",
]

_HOMES = {
    "ArithmeticRow": ".derived",
    "Difference": ".describing.dump",
    "FieldRow": ".describing.reference",
    "Resolver": ".components",
    "arithmetic": ".derived",
    "describe": ".describing.reference",
    "diff": ".describing.dump",
    "finalize": ".load",
    "json_schema": ".describing.reference",
    "load_config": ".load",
    "resolve_choice": ".components",
    "to_dict": ".describing.dump",
    "to_yaml": ".describing.dump",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
