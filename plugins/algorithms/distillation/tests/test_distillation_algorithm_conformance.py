"""The algorithms keep the contract of their kind, as they are and with the options that change their step."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmCase, AlgorithmContract
from nemo_rl_plugins_distillation.algorithm import Distillation, OffPolicyDistillation
from nemo_rl_plugins_distillation.cross_tokenizer import CrossTokenizerDistillation

SMALL = {"num_prompts_per_step": 25, "num_generations_per_prompt": 2, "top_k": 8}


class TestDistillation(AlgorithmContract):
    """The teacher answers in digits, so that the reward of the kit rises with the likeness to it."""

    @pytest.fixture
    def algorithm(self, teacher):
        return AlgorithmCase(component=Distillation, config={**SMALL, "teacher": {"model_name": str(teacher)}})


class TestSometimesOnPolicy(AlgorithmContract):
    """Half of the steps sample; the whole vocabulary is compared."""

    @pytest.fixture
    def algorithm(self, teacher):
        options = {"top_k": None, "lmbda": 0.5, "loss": "forward_kl"}
        return AlgorithmCase(
            component=Distillation, config={**SMALL, **options, "teacher": {"model_name": str(teacher)}}
        )


class TestPolicyGradient(AlgorithmContract):
    """Teacher minus student as advantages of the clipped loss."""

    @pytest.fixture
    def algorithm(self, teacher):
        options = {"loss": "clipped_pg", "advantage": "on_policy_distillation"}
        return AlgorithmCase(
            component=Distillation, config={**SMALL, **options, "teacher": {"model_name": str(teacher)}}
        )


class TestOffPolicy(AlgorithmContract):
    @pytest.fixture
    def algorithm(self, teacher):
        loss = {"name": "forward_kl", "options": {"tail": "bucket"}}
        return AlgorithmCase(
            component=OffPolicyDistillation, config={"loss": loss, "teacher": {"model_name": str(teacher)}, "top_k": 8}
        )


class TestSeveralTeachers(AlgorithmContract):
    @pytest.fixture
    def algorithm(self, teacher):
        teachers = {
            "digits": {"model_name": str(teacher), "weight": 3.0},
            "chance": {"model_name": "scratch:qwen2-tiny", "weight": 1.0},
        }
        return AlgorithmCase(component=OffPolicyDistillation, config={"teachers": teachers})


class TestSamplesAcrossTokenizers(AlgorithmContract):
    """What the student samples is tokenised again for the teacher (here by a tokenizer like its own)."""

    @pytest.fixture
    def algorithm(self, teacher):
        config = {"lmbda": 1.0, "teacher": {"model_name": str(teacher)}, "top_k": 16, "batch_size": 50}
        return AlgorithmCase(component=CrossTokenizerDistillation, config=config)


class TestAnotherTokenizer(AlgorithmContract):
    @pytest.fixture(params=["projected_kl", "sorted_probabilities"])
    def algorithm(self, stranger, request):
        return AlgorithmCase(
            component=CrossTokenizerDistillation,
            config={"loss": request.param, "teacher": {"model_name": str(stranger)}, "top_k": 16},
        )
