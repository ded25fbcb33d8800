"""NeMo RL: post-training for language models, made of plugins.

    import nemo_rl

    trainer = nemo_rl.GRPOTrainer.from_pretrained("Qwen/Qwen2.5-1.5B")
    trainer.fit(dataset="my.jsonl", reward_fn=lambda response, answer: float(answer in response))

Names are imported on first use, so that `import nemo_rl` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core import __version__
from nemo_rl_core.exports import lazy_exports

if TYPE_CHECKING:
    from nemo_rl.callbacks import CheckpointCallback, WandbCallback
    from nemo_rl.functional import evaluate, train
    from nemo_rl_core.hookspecs import hookimpl
    from nemo_rl_core.protocols.environment import Environment, EnvironmentStep, SingleTurnEnvironment
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.run_state import RunResult
    from nemo_rl_core.registry import (
        register_advantage,
        register_algorithm,
        register_callback,
        register_command,
        register_dataset,
        register_environment,
        register_generation_backend,
        register_launcher,
        register_logger,
        register_loss,
        register_reward,
        register_training_backend,
        register_weight_sync,
    )
    from nemo_rl_core.schema import ClusterConfig, PolicyConfig
    from nemo_rl_core.training.callbacks import Callback
    from nemo_rl_core.training.trainer import Trainer
    from nemo_rl_plugins_distillation.config import DistillationConfig
    from nemo_rl_plugins_distillation.trainer import DistillationTrainer
    from nemo_rl_plugins_dpo.config import DPOConfig
    from nemo_rl_plugins_dpo.trainer import DPOTrainer
    from nemo_rl_plugins_grpo.config import GRPOConfig
    from nemo_rl_plugins_grpo.presets import (
        CISPOConfig,
        DAPOConfig,
        DrGRPOConfig,
        GSPOConfig,
        ReinforcePPConfig,
        RLOOConfig,
    )
    from nemo_rl_plugins_grpo.trainer import (
        CISPOTrainer,
        DAPOTrainer,
        DrGRPOTrainer,
        GRPOTrainer,
        GSPOTrainer,
        ReinforcePPTrainer,
        RLOOTrainer,
    )
    from nemo_rl_plugins_ppo.config import PPOConfig
    from nemo_rl_plugins_ppo.trainer import PPOTrainer
    from nemo_rl_plugins_reward_model.config import RewardModelConfig
    from nemo_rl_plugins_reward_model.trainer import RewardModelTrainer
    from nemo_rl_plugins_sft.config import SFTConfig
    from nemo_rl_plugins_sft.trainer import SFTTrainer

_HOMES = {
    "BatchedDataDict": "nemo_rl_core.records.batch",
    "CISPOConfig": "nemo_rl_plugins_grpo.presets",
    "CISPOTrainer": "nemo_rl_plugins_grpo.trainer",
    "Callback": "nemo_rl_core.training.callbacks",
    "CheckpointCallback": "nemo_rl.callbacks",
    "ClusterConfig": "nemo_rl_core.schema.run",
    "DPOConfig": "nemo_rl_plugins_dpo.config",
    "DPOTrainer": "nemo_rl_plugins_dpo.trainer",
    "DAPOConfig": "nemo_rl_plugins_grpo.presets",
    "DAPOTrainer": "nemo_rl_plugins_grpo.trainer",
    "DrGRPOConfig": "nemo_rl_plugins_grpo.presets",
    "DrGRPOTrainer": "nemo_rl_plugins_grpo.trainer",
    "DistillationConfig": "nemo_rl_plugins_distillation.config",
    "DistillationTrainer": "nemo_rl_plugins_distillation.trainer",
    "Environment": "nemo_rl_core.protocols.environment",
    "EnvironmentStep": "nemo_rl_core.protocols.environment",
    "GRPOConfig": "nemo_rl_plugins_grpo.config",
    "GRPOTrainer": "nemo_rl_plugins_grpo.trainer",
    "PPOConfig": "nemo_rl_plugins_ppo.config",
    "PPOTrainer": "nemo_rl_plugins_ppo.trainer",
    "PolicyConfig": "nemo_rl_core.schema.run",
    "RewardModelConfig": "nemo_rl_plugins_reward_model.config",
    "RewardModelTrainer": "nemo_rl_plugins_reward_model.trainer",
    "GSPOConfig": "nemo_rl_plugins_grpo.presets",
    "GSPOTrainer": "nemo_rl_plugins_grpo.trainer",
    "RLOOConfig": "nemo_rl_plugins_grpo.presets",
    "RLOOTrainer": "nemo_rl_plugins_grpo.trainer",
    "ReinforcePPConfig": "nemo_rl_plugins_grpo.presets",
    "ReinforcePPTrainer": "nemo_rl_plugins_grpo.trainer",
    "RunResult": "nemo_rl_core.records.run_state",
    "SFTConfig": "nemo_rl_plugins_sft.config",
    "SFTTrainer": "nemo_rl_plugins_sft.trainer",
    "SingleTurnEnvironment": "nemo_rl_core.protocols.environment",
    "Trainer": "nemo_rl_core.training.trainer",
    "WandbCallback": "nemo_rl.callbacks",
    "evaluate": "nemo_rl.functional",
    "hookimpl": "nemo_rl_core.hookspecs",
    "train": "nemo_rl.functional",
    **{
        f"register_{kind}": "nemo_rl_core.registry"
        for kind in (
            "advantage",
            "algorithm",
            "callback",
            "command",
            "dataset",
            "environment",
            "generation_backend",
            "launcher",
            "logger",
            "loss",
            "reward",
            "training_backend",
            "weight_sync",
        )
    },
}

__all__ = [
    "BatchedDataDict",
    "CISPOConfig",
    "CISPOTrainer",
    "Callback",
    "CheckpointCallback",
    "ClusterConfig",
    "DAPOConfig",
    "DAPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "DrGRPOConfig",
    "DrGRPOTrainer",
    "Environment",
    "EnvironmentStep",
    "GRPOConfig",
    "GRPOTrainer",
    "GSPOConfig",
    "GSPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PolicyConfig",
    "RLOOConfig",
    "RLOOTrainer",
    "ReinforcePPConfig",
    "ReinforcePPTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RunResult",
    "SFTConfig",
    "SFTTrainer",
    "SingleTurnEnvironment",
    "Trainer",
    "WandbCallback",
    "__version__",
    "evaluate",
    "hookimpl",
    "register_advantage",
    "register_algorithm",
    "register_callback",
    "register_command",
    "register_dataset",
    "register_environment",
    "register_generation_backend",
    "register_launcher",
    "register_logger",
    "register_loss",
    "register_reward",
    "register_training_backend",
    "register_weight_sync",
    "train",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
