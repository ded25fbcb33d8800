"""Test bench for the contract of a training backend: backends, batches and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor

from nemo_rl_core.config.layouts import replica_sizes
from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.loss import Loss
from nemo_rl_core.protocols.training_backend import StepPlan, StepResult, TrainingBackend
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_core.testing.conformance.cases.reference import (
    TINY_SHAPE,
    ReferenceTrainer,
    TinyModel,
    WeightedLoss,
    forward_logits,
    ragged_batch,
    tiny_model,
)
from nemo_rl_core.testing.conformance.frame.set_up import SetUpContract
from nemo_rl_core.testing.conformance.frame.subject import Configured, configured
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained

if TYPE_CHECKING:
    from nemo_rl_core.training.model.policy import Policy

__all__ = [
    "OPTIMIZER",
    "BackendUnderTest",
    "Start",
    "TrainingBench",
    "TwoSteps",
    "equal_bits",
    "loss_of",
    "two_steps",
    "weights_of",
    "without_mask",
]

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-4)
"""The large `eps` keeps tiny gradients, of which rounding decides the sign, from being blown up to full steps."""
Start = Callable[..., TrainingBackend]
"""Type of the fixture `start`."""
BackendUnderTest = type[TrainingBackend] | Configured[TrainingBackend]
"""Type of the fixture `backend`."""


class TrainingBench(SetUpContract):
    """Base of the contract of a training backend: sets up backends and compares them.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
        model_shape: `config.json` of the model that is trained, for a backend that cannot train the default one.
        device: torch device of the backend.
        tolerance: Largest difference of a logprob, a weight or a norm from the plain loop, relative to 1 or its size.
        num_processes: Data-parallel processes that must take the step of one; 0 skips the clause.
    """

    kind: ClassVar[str] = "training_backends"
    subject: ClassVar[str] = "backend"
    model_shape: ClassVar[Mapping[str, Any]] = TINY_SHAPE
    device: ClassVar[str] = "cpu"
    tolerance: ClassVar[float] = 1e-4
    num_processes: ClassVar[int] = 2

    @pytest.fixture
    def backend(self) -> type:
        """The component class under test."""
        pytest.fail(f"{type(self).__name__} must define a fixture `backend` that returns the class to test.")

    @pytest.fixture
    def start(self, backend: BackendUnderTest) -> Iterator[Start]:
        """`start(**policy)` is a backend that was set up; it is shut down after the clause."""
        case = configured(backend, self.config_options)
        running: list[TrainingBackend] = []

        def make(*, seed: int = 0, **policy: object) -> TrainingBackend:
            made: TrainingBackend = case.loaded()
            running.append(made)
            made.setup(self.policy(case.options, **policy), WorkerContext(device=self.device, seed=seed, num_threads=1))
            return made

        yield make
        for made in running:
            made.shutdown()

    def capable(self, backend: BackendUnderTest, start: Start, capability: str, **policy: object) -> TrainingBackend:
        """Set up a backend and return it; skip the clause if it lacks the capability."""
        if capability not in configured(backend, self.config_options).loaded.capabilities:
            pytest.skip(f"it lacks the capability {capability!r}")
        made: TrainingBackend = start(**policy)
        return made

    def says_its_layout(self, backend: BackendUnderTest) -> None:
        """Check the class's layout of the kit's policy on one worker and, with "tensor_parallel", on two."""
        case = configured(backend, self.config_options)
        workers = (1, 2) if "tensor_parallel" in case.loaded.capabilities else (1,)
        for count in workers:
            policy = self.policy(case.options, num_workers=count, tensor_parallel_size=count)
            sizes = replica_sizes(policy)
            assert math.prod(sizes.values()) == count, f"on {count} workers a replica is {sizes}"
            for path in sizes:
                assert attrgetter(path)(policy) == sizes[path], f"{path} is not {sizes[path]} in the policy"
        found = [m.problem for m in case.loaded.check(self.policy(case.options, num_workers=1))]
        assert not found, f"on one worker it finds {found}"

    @property
    def tiny(self) -> TinyModel:
        """The checkpoint that the backend trains."""
        return tiny_model(self.model_shape)

    # -- running -------------------------------------------------------------------------------

    def policy(self, options: object, **policy: Any) -> PolicyConfig:
        """Return the configuration of the policy on the tiny model, without clipping unless it is asked for."""
        defaults = {"model_name": self.tiny.folder, "optimizer": OPTIMIZER, "max_grad_norm": None}
        return PolicyConfig(options=options, **{**defaults, **policy})

    def batch(self, seed: int = 0) -> BatchedDataDict:
        """Make a batch of random sequences of the model's tokens."""
        return ragged_batch(vocab_size=self.tiny.vocab_size, seed=seed)

    def reference(self, max_grad_norm: float | None = None) -> ReferenceTrainer:
        """Make the plain training loop, with the weights that the backends start from."""
        return ReferenceTrainer(self.tiny.copy(), OPTIMIZER, max_grad_norm=max_grad_norm)

    def predicted(self, batch: BatchedDataDict, temperature: float) -> Tensor:
        """[N, V] logprobs of the distribution that predicts each token; uniform at each first one."""
        parts = []
        for ids in batch.unpack("input_ids"):
            logits = forward_logits(self.tiny.model, ids)[:-1] / temperature
            parts += [torch.zeros(1, logits.shape[1]).log_softmax(-1), logits.log_softmax(-1)]
        return torch.cat(parts)

    def step(
        self,
        backend: TrainingBackend,
        batch: BatchedDataDict,
        loss: Loss | None = None,
        *,
        micro_batches: Sequence[Sequence[int]] | None = None,
        **plan: Any,
    ) -> StepResult:
        """Take one step with a loss that is divided by the counts of the whole batch."""
        loss_fn = NormalizedLoss(loss or WeightedLoss(), count_trained(batch))
        cut = [list(range(len(batch)))] if micro_batches is None else micro_batches
        return backend.train_step(batch, loss_fn, StepPlan(micro_batches=cut, **plan))

    def refuses(
        self, backend: TrainingBackend, path: Path, folder: Path, how: str, damage: Callable[[bytes], bytes] | None
    ) -> None:
        """Fail unless loading is refused while this file is damaged; then repair the file."""
        whole = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(whole))
        try:
            backend.load_checkpoint(folder)
        except CheckpointError as error:
            assert path.name in str(error), f"the error about {path.name}, which is {how}, does not name it: {error}"
        except Exception as error:
            pytest.fail(f"with {path.name} {how} it raised {type(error).__name__}, not CheckpointError: {error}")
        else:
            pytest.fail(f"it loaded a checkpoint of which {path.name} is {how}")
        path.write_bytes(whole)

    def leave_and_return(self, backend: TrainingBackend) -> None:
        """Offload and reload twice, each also when there is nothing to do; on a CUDA device memory must come free."""
        on_cuda = torch.device(self.device).type == "cuda"
        size = sum(tensor.nbytes for tensor in weights_of(backend).values())
        for _ in range(2):
            held = torch.cuda.memory_allocated(self.device) if on_cuda else 0
            backend.offload()
            backend.offload()
            freed = held - (torch.cuda.memory_allocated(self.device) if on_cuda else 0)
            backend.reload()
            backend.reload()
            enough = freed >= size or not on_cuda or "offload" not in backend.capabilities
            assert enough, f"offload gave {freed} bytes of the device back; the weights alone take {size}"

    # -- comparing -----------------------------------------------------------------------------

    def same(self, found: Tensor | float, expected: Tensor | float, what: str, factor: float = 1.0) -> None:
        """Fail unless two numbers, or two tensors of one shape [...], are equal within the tolerance."""
        ours, theirs = torch.as_tensor(found).detach().float(), torch.as_tensor(expected).detach().float()
        assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, not {list(theirs.shape)}"
        worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
        scale = max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
        fine = worst <= factor * self.tolerance * scale  # False for nan
        assert fine, (
            f"{what} differs by {worst:.3g} from what it must be (tolerance {factor * self.tolerance * scale:.2g})"
        )

    def same_weights(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str, factor: float = 1.0
    ) -> None:
        """Fail unless two sets of weights, tensors [...] by name, are equal within the tolerance."""
        assert found.keys() == expected.keys(), f"other weights {when}: {sorted(found.keys() ^ expected.keys())[:4]}"
        for name, value in expected.items():
            self.same(found[name], value, f"{name} {when}", factor)


# -- small pieces ----------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class TwoSteps:
    """The results of two steps."""

    metrics: Mapping[str, float]
    logprobs: Tensor
    """[N] float32."""
    weights: Mapping[str, Tensor]


def two_steps(policy: Policy, batch: BatchedDataDict) -> TwoSteps:
    """Take two steps on one batch through `Policy`, the core's view of the workers."""
    for _ in range(2):
        metrics = policy.train_step(batch, WeightedLoss())
    weights = {name: tensor.clone() for name, tensor in policy.group.iterate("export_weights", timeout_s=60.0)}
    return TwoSteps(metrics=metrics, logprobs=policy.logprobs(without_mask(batch)), weights=weights)


def weights_of(backend: TrainingBackend) -> dict[str, Tensor]:
    """Copy the exported weights by name, each [...] of its own shape, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in backend.export_weights()}


def equal_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of weights, tensors [...] by name, are equal bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def loss_of(result: StepResult) -> float:
    """Return the normalized loss that a step reports."""
    assert "loss" in result.metrics, f"the step reports no `loss`; it reports {sorted(result.metrics)}"
    return float(result.metrics["loss"].total)


def without_mask(batch: BatchedDataDict) -> BatchedDataDict:
    """Return a batch of the token ids alone, so that the logprob of every token is wanted."""
    return BatchedDataDict(batch.lengths, {"input_ids": batch["input_ids"]})
