"""Contracts and decorators for authors of backends."""

from __future__ import annotations

from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.training_backend import StepPlan, StepResult, TrainingBackend
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.registry import register_generation_backend, register_training_backend

__all__ = [
    "Completion",
    "GenerationBackend",
    "GenerationRequest",
    "SamplingParams",
    "StepPlan",
    "StepResult",
    "TrainingBackend",
    "WorkerContext",
    "register_generation_backend",
    "register_training_backend",
]
