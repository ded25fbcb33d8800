"""Requests and completions in the terms of vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.records.completion import Completion

if TYPE_CHECKING:
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.outputs import CompletionOutput

__all__ = ["Limits", "completion", "refusal", "sampling_params"]


@frozen(kw_only=True)
class Limits:
    """What a request must keep to."""

    max_length: int
    """Tokens of prompt and completion together."""
    vocab_size: int
    eos: tuple[int, ...]
    """Token ids that end a completion."""
    has_tokenizer: bool

    def check(self, request: GenerationRequest) -> None:
        """Refuse what cannot be served.

        Raises:
            GenerationError: The prompt is empty, leaves no room in the context or holds an unknown token, or the
                sampling parameters make no sense.
        """
        prompt, sampling = request.prompt_ids, request.sampling
        if len(prompt) == 0:
            raise refusal(request, "the prompt is empty", "Give at least one token (such as the BOS token).")
        if len(prompt) >= self.max_length:
            raise refusal(
                request,
                f"its prompt of {len(prompt)} tokens leaves no room in the context of {self.max_length}",
                "Shorten the prompt or raise policy.max_sequence_length.",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise refusal(
                request,
                f"its prompt holds token ids outside of 0..{self.vocab_size - 1}",
                "Use the tokenizer of this model.",
            )
        if sampling.max_new_tokens < 1 or not sampling.temperature >= 0 or sampling.top_k < 0:
            raise refusal(request, f"{sampling} makes no sense", "max_new_tokens >= 1, temperature and top_k >= 0.")
        if not 0 < sampling.top_p <= 1:
            raise refusal(request, f"top_p is {sampling.top_p}", "It must be above 0 and at most 1.")
        if any(sampling.stop) and not self.has_tokenizer:
            raise refusal(request, "stop strings need the model's tokenizer, which could not be loaded", "")


def refusal(request: GenerationRequest, what: str, fix: str) -> GenerationError:
    """The error of a request that cannot be served."""
    return GenerationError(f"Request {request.request_id!r}: {what}. {fix}".rstrip())


def sampling_params(request: GenerationRequest, limits: Limits) -> VLLMSamplingParams:
    """How vLLM is to sample a request that `limits` has checked.

    Ends of sequence go along as stop tokens, so that they are those of `nemo_rl_core.models` and are reported.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    s = request.sampling
    stop = [text for text in s.stop if text]
    return SamplingParams(
        max_tokens=min(s.max_new_tokens, limits.max_length - len(request.prompt_ids)),
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        seed=s.seed,
        stop=stop,
        stop_token_ids=[*s.stop_token_ids, *(() if s.ignore_eos else limits.eos)],
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(stop),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def completion(request: GenerationRequest, output: CompletionOutput, *, weight_version: int) -> Completion:
    """What vLLM sampled.

    Args:
        request: What was asked for.
        output: The finished output.
        weight_version: Of a completion without tokens.

    Raises:
        GenerationError: vLLM reports an error, or logprobs are not finite.
    """
    token_ids, logprobs = list(output.token_ids), _logprobs(output.logprobs)
    if output.finish_reason not in ("stop", "length", "abort"):
        raise refusal(request, f"vLLM ended it with {output.finish_reason!r}", "Its log has the cause.")
    if len(logprobs) != len(token_ids) or not math.isfinite(math.fsum(logprobs)):
        raise refusal(
            request,
            f"{len(token_ids)} tokens were sampled with {len(logprobs)} logprobs, or some are not finite",
            "Look for weights that are not finite.",
        )
    spans = output.weight_versions or []
    return Completion(
        request_id=request.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        weight_version=int(spans[0].version) if spans else weight_version,
        last_weight_version=int(spans[-1].version) if spans else weight_version,
    )


def _logprobs(found: Any) -> list[float]:
    """Of the sampled tokens: with `logprobs=0` vLLM reports those and no others."""
    if found is None:
        return []
    flat: Sequence[float] = found.logprobs
    return list(flat)
