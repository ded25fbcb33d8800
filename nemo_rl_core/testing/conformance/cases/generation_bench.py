"""Test bench for the contract of a generation backend: engines, requests and comparisons."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_core.testing.conformance.cases.reference import (
    TINY_SHAPE,
    TinyModel,
    forward_logits,
    sampling_distribution,
    tiny_model,
)
from nemo_rl_core.testing.conformance.frame.set_up import SetUpContract
from nemo_rl_core.testing.conformance.frame.subject import Configured, Expecting, configured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PROMPT",
    "PROMPTS",
    "EngineUnderTest",
    "GenerationBench",
    "Start",
    "all_different",
    "chi_square",
    "in_one_buffer",
    "make_request",
    "numbered_prompts",
]

PROMPT = (20, 31, 42, 53, 64)
PROMPTS = ((20,), PROMPT, tuple(range(30, 50)), PROMPT, (20, 31, 42, 53, 64, 75), (99, 3, 99))
"""Of mixed length, two equal, one the beginning of another."""
_Result = TypeVar("_Result")
Start = Callable[..., GenerationBackend]
"""Type of the fixture `start`."""
EngineUnderTest = type[GenerationBackend] | Configured[GenerationBackend]
"""Type of the fixture `engine`."""


class GenerationBench(SetUpContract):
    """Base of the contract of a generation backend: sets up engines, sends requests and compares answers.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
        model_shape: `config.json` of the model that is sampled from, for an engine that cannot run the default one.
        device: torch device of the engine.
        tolerance: Largest difference of a logprob from the plain forward pass.
        num_concurrent: Requests at a time, more than the engine decodes together.
        wait_s: Deadline of any completion.
    """

    kind: ClassVar[str] = "generation_backends"
    subject: ClassVar[str] = "engine"
    model_shape: ClassVar[Mapping[str, Any]] = TINY_SHAPE
    device: ClassVar[str] = "cpu"
    tolerance: ClassVar[float] = 1e-4
    num_concurrent: ClassVar[int] = 100
    wait_s: ClassVar[float] = 20.0

    @pytest.fixture
    def engine(self) -> type:
        """The component class under test."""
        pytest.fail(f"{type(self).__name__} must define a fixture `engine` that returns the class to test.")

    @pytest.fixture
    def start(self, engine: EngineUnderTest) -> Iterator[Start]:
        """`start(max_sequence_length=...)` is an engine that was set up; it is shut down after the clause."""
        case = configured(engine, self.config_options)
        running: list[GenerationBackend] = []

        def make(*, max_sequence_length: int = 256, seed: int = 0) -> GenerationBackend:
            made: GenerationBackend = case.loaded()
            running.append(made)
            config = GenerationConfig(
                model_name=self.tiny.folder,
                options=case.options,
                precision="float32",
                max_sequence_length=max_sequence_length,
            )
            made.setup(config, WorkerContext(role="generation", device=self.device, seed=seed, num_threads=1))
            return made

        yield make
        for made in running:
            made.shutdown()

    @property
    def tiny(self) -> TinyModel:
        """The checkpoint that the engine runs."""
        return tiny_model(self.model_shape)

    # -- asking --------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, _Result], what: str) -> _Result:
        """Run a coroutine to its end; `what` is waited for at most `wait_s`."""

        async def within() -> _Result:
            try:
                return await asyncio.wait_for(work, self.wait_s)
            except TimeoutError:
                pytest.fail(f"{what}: no answer after {self.wait_s:g} s")

        return asyncio.run(within())

    def complete(self, engine: GenerationBackend, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Send all requests at once and return their completions."""

        async def all_of_them() -> list[Completion]:
            return list(await asyncio.gather(*(engine.generate(request) for request in requests)))

        return self.run(all_of_them(), f"{len(requests)} requests at a time")

    def update(self, engine: GenerationBackend, version: int, weights: Mapping[str, Tensor]) -> None:
        """Refit the engine with copies of these weights, each [...] of its own shape."""
        engine.update_weights(version, iter(weights.items()), share=False)

    async def updated_in_flight(self, engine: GenerationBackend, version: int) -> Completion:
        """Return a long completion during which the weights are updated."""
        first = make_request("first", PROMPT, seed=version, max_new_tokens=1, ignore_eos=True)
        long = make_request("long", PROMPT, seed=version, max_new_tokens=900, ignore_eos=True)
        call: Awaitable[Completion] = asyncio.ensure_future(engine.generate(long))
        await engine.generate(first)
        await asyncio.to_thread(self.update, engine, version, self.tiny.changed_weights(seed=version))
        return await call

    def refuses(self, engine: GenerationBackend, prompt: tuple[int, ...]) -> None:
        """Fail unless a prompt is refused with a GenerationError and the next request is served."""
        fine = make_request("fine", (20, 31), seed=0, max_new_tokens=2, ignore_eos=True)
        with Expecting(GenerationError, f"a prompt of {len(prompt)} tokens"):
            self.complete(engine, [make_request("bad", prompt, max_new_tokens=4)])
        self.same_logprobs([fine], self.complete(engine, [fine]), self.tiny.model, "after a refused request: ")

    def stops(
        self,
        engine: GenerationBackend,
        sampling: Callable[[list[int]], dict[str, Any]],
        reason: Callable[[list[int]], str | int],
    ) -> None:
        """Fail unless a completion stops where `sampling`, computed from its uncut tokens, says."""
        common = {"seed": 3, "temperature": 1.3, "ignore_eos": True, "max_new_tokens": 20}
        for prompt in PROMPTS[:3]:
            (whole,) = self.complete(engine, [make_request("r", prompt, **common)])
            tokens = whole.token_ids
            if tokens[3] in tokens[:3] or self.tiny.tokenizer.eos_token_id in tokens[:4]:
                continue  # the stop would come earlier
            request = make_request("r", prompt, **common, **sampling(tokens))
            (cut,) = self.complete(engine, [request])
            assert cut.token_ids == tokens[:4], f"it kept {cut.token_ids}; up to and with the stop: {tokens[:4]}"
            assert cut.finish_reason == "stop", f"finish_reason is {cut.finish_reason!r}"
            assert cut.stop_reason == reason(tokens), f"stop_reason is {cut.stop_reason!r}, not {reason(tokens)!r}"
            assert len(cut.logprobs) == 4, f"{len(cut.logprobs)} logprobs for 4 tokens"
            self.same_logprobs([request], [cut], self.tiny.model, "with the stop as its last token: ")
            return
        pytest.fail("no completion has a fourth token that it had not before: it does not sample")

    # -- comparing -----------------------------------------------------------------------------

    def predictions(self, model: PreTrainedModel, request: GenerationRequest, completion: Completion) -> Tensor:
        """[T, V] logits that predict the tokens of a completion."""
        ids = [*request.prompt_ids, *completion.token_ids]
        return forward_logits(model, ids)[len(request.prompt_ids) - 1 : -1]

    def same_logprobs(
        self,
        requests: Sequence[GenerationRequest],
        completions: Sequence[Completion],
        model: PreTrainedModel,
        when: str = "",
    ) -> None:
        """Fail unless the logprobs of each completion are those of the distribution that it must be drawn from."""
        for request, completion in zip(requests, completions, strict=True):
            s, tokens = request.sampling, completion.token_ids
            assert len(completion.logprobs) == len(tokens), f"{when}not one logprob for each token"
            logits = self.predictions(model, request, completion)
            expected = sampling_distribution(logits, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
            wanted = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            impossible = int((wanted == -torch.inf).sum())
            assert not impossible, f"{when}{impossible} tokens are outside of top_p={s.top_p}, top_k={s.top_k}"
            worst = float((torch.tensor(completion.logprobs) - wanted).abs().max())
            assert worst <= self.tolerance, (
                f"{when}logprobs differ by {worst:.3g} from a full forward pass (temperature {s.temperature}, "
                f"top_p {s.top_p}, top_k {s.top_k}, prompt of {len(request.prompt_ids)} tokens)"
            )


# -- small pieces ----------------------------------------------------------------------------------------


def make_request(name: str, prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    """Make a request with these sampling parameters."""
    return GenerationRequest(request_id=name, prompt_ids=prompt, sampling=SamplingParams(**sampling))


def numbered_prompts() -> list[tuple[int, tuple[int, ...]]]:
    """Return the index and the token ids of each of `PROMPTS`."""
    return list(enumerate(PROMPTS))


def all_different(completions: Sequence[Completion], of_what: str) -> None:
    """Fail if two completions have the same tokens."""
    different = len({tuple(c.token_ids) for c in completions})
    assert different == len(completions), f"{len(completions)} {of_what} gave only {different} different completions"


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return how far `counts` [V] are from `expected` [V], in standard deviations (Wilson and Hilferty 1931).

    Outcomes of which fewer than 5 are expected are taken together.
    """
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).double().clamp_min(1e-9)
    statistic = float(((seen - wanted).square() / wanted).sum())
    spread = 2 / (9 * (len(seen) - 1))
    deviation: float = ((statistic / (len(seen) - 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return deviation


def in_one_buffer(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors [...] as a weight sync hands them over: all in the same bytes, which the next one overwrites."""
    buffer = torch.empty(max(tensor.nbytes for tensor in weights.values()), dtype=torch.uint8)
    for name, tensor in weights.items():
        lent = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        lent.copy_(tensor)
        yield name, lent
        buffer.fill_(0xA5)
