"""Generation backend without a model: replays a script.

For tests of everything around an engine. Completions depend on the request alone (prompt and seed), never
on timing, so results can be compared whatever the order of completion. Latency, failures and hanging are
part of the script.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.models.tokenizer import Tokenizer
from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.records.completion import Completion, FinishReason

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig

__all__ = ["ScriptedGeneration", "ScriptedReply"]


@frozen(kw_only=True)
class ScriptedReply:
    """What the engine does for one request."""

    text: str | None = None
    """Tokenised, and ended by the end-of-sequence token."""
    token_ids: Sequence[int] | None = None
    """Given as they are, instead of `text`."""
    logprobs: Sequence[float] | None = None
    """None makes `ScriptedGeneration.logprob` of each token."""
    latency_s: float = 0.0
    error: Exception | None = None
    """Raised after the latency."""
    hang: bool = False
    """Never answer."""


Script = Callable[[GenerationRequest], "ScriptedReply | str | Sequence[int]"]


class ScriptedGeneration:
    """A `GenerationBackend` that answers from a script.

    Args:
        script: A function of the request; or texts, of which the request's seed picks one; or one text.
            A text, token ids or a `ScriptedReply`.
        tokenizer: Needed for texts.

    Attributes:
        requests: Every request so far, in order of arrival.
        num_active, max_active: Requests being served, now and at most.
        num_cancelled: Requests whose caller gave up.
    """

    config_class: ClassVar[type] = dict
    capabilities: ClassVar[frozenset[str]] = frozenset({"in_flight_updates", "sleep"})

    def __init__(self, script: Script | Sequence[str] | str = "", tokenizer: Tokenizer | None = None) -> None:
        self._script = _as_function(script)
        self._tokenizer = tokenizer
        self.version = 0
        self._paused = False
        self.requests: list[GenerationRequest] = []
        self.num_active = 0
        self.max_active = 0
        self.num_cancelled = 0
        self.weights: dict[str, Tensor] = {}

    @staticmethod
    def logprob(token_id: int, position: int) -> float:
        """Return the made-up logprob in nats of a token at a position of its completion, finite and negative."""
        return -(1.0 + (token_id * 31 + position * 7) % 97) / 97.0

    def setup(self, config: GenerationConfig, context: WorkerContext) -> None:
        """Do nothing: there is no engine to build."""

    async def generate(self, request: GenerationRequest) -> Completion:
        """Return what the script says, cut at `max_new_tokens` and after the first stop token or stop string.

        Raises:
            GenerationError: The prompt is empty, or the script says so.
        """
        if not request.prompt_ids:
            raise GenerationError(f"Request {request.request_id}: the prompt is empty.")
        version = self.version
        self.requests.append(request)
        self.num_active += 1
        self.max_active = max(self.max_active, self.num_active)
        try:
            while self._paused:
                await asyncio.sleep(0.001)
            reply = _as_reply(self._script(request))
            if reply.hang:
                await asyncio.Event().wait()
            if reply.latency_s:
                await asyncio.sleep(reply.latency_s)
            if reply.error is not None:
                raise reply.error
            return self._complete(request, reply, version)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_active -= 1

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Keep the tensors, each [...] of its own shape, and stamp later completions with `version`."""
        self.weights = dict(tensors)
        self.version = version

    def pause(self) -> None:
        """Answer no request until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Undo `pause`."""
        self._paused = False

    def fingerprint(self) -> str:
        """Return a text that names the version, as there are no weights to digest."""
        return f"scripted-{self.version}"

    def metrics(self) -> Mapping[str, float]:
        """Return the number of requests received so far."""
        return {"requests": float(len(self.requests))}

    def sleep(self) -> None:
        """Do nothing: the script holds no memory of a device."""

    def wake(self) -> None:
        """Do nothing, as `sleep` did nothing."""

    def shutdown(self) -> None:
        """Do nothing: no thread or process is running."""

    def _complete(self, request: GenerationRequest, reply: ScriptedReply, version: int) -> Completion:
        token_ids = self._tokens(reply)
        token_ids, finish_reason, stop_reason = self._stop(request, token_ids)
        logprobs = reply.logprobs
        if logprobs is None:
            logprobs = [self.logprob(token, i) for i, token in enumerate(token_ids)]
        return Completion(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=list(logprobs[: len(token_ids)]),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            weight_version=version,
            last_weight_version=self.version,
        )

    def _tokens(self, reply: ScriptedReply) -> list[int]:
        if reply.token_ids is not None:
            return list(reply.token_ids)
        if self._tokenizer is None:
            raise GenerationError("A script of texts needs ScriptedGeneration(script, tokenizer).")
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        return self._tokenizer.encode(reply.text or "", add_special_tokens=False) + end

    def _stop(
        self, request: GenerationRequest, token_ids: list[int]
    ) -> tuple[list[int], FinishReason, str | int | None]:
        sampling = request.sampling
        ends = set(sampling.stop_token_ids)
        if self._tokenizer is not None and self._tokenizer.eos_token_id is not None and not sampling.ignore_eos:
            ends.add(self._tokenizer.eos_token_id)
        for i, token in enumerate(token_ids[: sampling.max_new_tokens]):
            if token in ends:
                return token_ids[: i + 1], "stop", token
            if sampling.stop and self._tokenizer is not None:
                text = self._tokenizer.decode(token_ids[: i + 1])
                for stop in sampling.stop:
                    if stop in text:
                        return token_ids[: i + 1], "stop", stop
        if len(token_ids) >= sampling.max_new_tokens:
            return token_ids[: sampling.max_new_tokens], "length", None
        return token_ids, "stop", None


def _as_function(script: Script | Sequence[str] | str) -> Script:
    if isinstance(script, str):
        text = script
        return lambda request: text
    if callable(script):
        return script
    texts = list(script)
    return lambda request: texts[(request.sampling.seed or 0) % len(texts)]


def _as_reply(value: ScriptedReply | str | Sequence[int]) -> ScriptedReply:
    if isinstance(value, ScriptedReply):
        return value
    return ScriptedReply(text=value) if isinstance(value, str) else ScriptedReply(token_ids=value)
