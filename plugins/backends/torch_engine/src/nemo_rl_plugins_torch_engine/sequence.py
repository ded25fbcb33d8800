"""What the scheduler knows of a request and of a prompt that several requests share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from attrs import define, field
from torch import Tensor

from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.records.completion import Completion, FinishReason

if TYPE_CHECKING:
    from nemo_rl_plugins_torch_engine.stopping import StopStrings

__all__ = ["Prompt", "Sequence"]


@define(eq=False)
class Prompt:
    """A prompt, its cached state, and the requests that have it."""

    token_ids: tuple[int, ...]
    num_waiting: int = 0
    holders: list[Sequence] = field(factory=list)
    """Active sequences whose rows hold the prompt's K/V."""
    logits: Tensor | None = None
    """[V] after the last prompt token; None until it is prefilled."""
    snapshot: list[tuple[Tensor, Tensor]] | None = None
    """K and V per layer, [kv heads, T, D], kept while requests wait and no row holds them."""

    def forget(self) -> None:
        """Drop what was computed with the weights of before."""
        self.logits = None
        self.snapshot = None
        self.holders.clear()


@define(eq=False)
class Sequence:
    """A request on its way to a completion."""

    request: GenerationRequest
    prompt_ids: tuple[int, ...]
    seed: int
    stop_ids: frozenset[int]
    limit: int
    """Tokens it may sample: `max_new_tokens`, or fewer if the context ends before."""
    stop_strings: StopStrings | None
    future: asyncio.Future[Completion]
    loop: asyncio.AbstractEventLoop
    token_ids: list[int] = field(factory=list)
    logprobs: list[float] = field(factory=list)
    prompt: Prompt = field(init=False)
    """Set by the scheduler, in whose thread prompts live."""
    row: int = -1
    """Row of the batch and of the cache; -1 while it waits."""
    cancelled: bool = False
    first_version: int = 0
    last_version: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)

    def append(self, token_id: int, logprob: float, version: int) -> bool:
        """Add a sampled token; whether that ends the sequence."""
        if not self.token_ids:
            self.first_version = version
        self.last_version = version
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self.stop_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
            return True
        if self.stop_strings is not None:
            stop = self.stop_strings.find(self.token_ids)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return True
        if len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
            return True
        return False

    def completion(self) -> Completion:
        """The result of a finished sequence."""
        return Completion(
            request_id=self.request.request_id,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            weight_version=self.first_version,
            last_weight_version=self.last_version,
        )
