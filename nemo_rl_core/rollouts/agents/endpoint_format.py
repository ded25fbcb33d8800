"""Conversion between the chat API and the policy's calls and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nemo_rl_core.errors import DataError
from nemo_rl_core.protocols.policy import PolicyAnswer, PolicyCall, PolicyChoice

__all__ = ["answer_body", "call_of", "error_body", "events_of"]

Body = Mapping[str, Any]


def call_of(body: object, *, chat: bool) -> PolicyCall:
    """Return the call that a body asks for.

    Raises:
        DataError: It is malformed, or asks for something that cannot be given.
    """
    if not isinstance(body, Mapping):
        raise DataError("The body must be a JSON object.")
    _refuse_unserved(body, chat=chat)
    common: dict[str, Any] = {
        "n": 1 if body.get("n") is None else body["n"],
        "max_new_tokens": _whole(body, "max_completion_tokens") or _whole(body, "max_tokens"),
        "stop": _stop(body.get("stop")),
        "seed": _whole(body, "seed"),
    }
    if not chat:
        return PolicyCall(prompt=_prompt(body.get("prompt")), **common)
    if not isinstance(body.get("messages"), list):
        raise DataError("messages must be a list.")
    tools = () if body.get("tool_choice") == "none" else _tools(body.get("tools"))
    single = body.get("parallel_tool_calls") is False
    return PolicyCall(messages=body["messages"], tools=tools, single_tool_call=single, **common)


def _refuse_unserved(body: Body, *, chat: bool) -> None:
    """Refuse what is not served and would change the answer; what only steers the sampling is up to the run."""
    choice = body.get("tool_choice")
    wanted = body.get("response_format")
    unserved = {
        "logit_bias": bool(body.get("logit_bias")),
        "functions (use tools)": bool(body.get("functions")),
        "response_format other than text": wanted is not None and wanted != {"type": "text"},
        "tool_choice other than auto and none": choice not in (None, "auto", "none"),
        "modalities other than text": bool(set(body.get("modalities") or ()) - {"text"}),
        "top_logprobs above 0": chat and bool(body.get("top_logprobs")),
        "logprobs above 1": not chat and (_whole(body, "logprobs") or 0) > 1,
        "echo": bool(body.get("echo")),
        "suffix": bool(body.get("suffix")),
        "best_of above n": (_whole(body, "best_of") or 1) > (_whole(body, "n") or 1),
    }
    if names := [name for name, is_set in unserved.items() if is_set]:
        raise DataError(f"Not served: {', '.join(names)}. Leave it out of the call.")


def _whole(body: Body, name: str) -> int | None:
    value = body.get(name)
    if value is None or type(value) is int:
        return value
    if isinstance(value, bool):  # `logprobs` of a chat
        return int(value)
    raise DataError(f"{name} must be a whole number; found {value!r:.80}.")


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"stop must be a string or a list of strings; found {value!r:.80}.")
    return tuple(texts)


def _tools(value: object) -> Sequence[Body]:
    tools = value or []
    if not isinstance(tools, list) or not all(map(_is_named_tool, tools)):
        raise DataError('tools must be a list of {"type": "function", "function": {"name": ..., "parameters": ...}}.')
    return list(tools)


def _is_named_tool(tool: object) -> bool:
    return (
        isinstance(tool, Mapping)
        and tool.get("type", "function") == "function"
        and isinstance(tool.get("function"), Mapping)
        and isinstance(tool["function"].get("name"), str)
    )


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise DataError("prompt must be a string or a list of token ids; several prompts take several calls.")


# -- answers ---------------------------------------------------------------------------------------------------


def answer_body(
    answer: PolicyAnswer, body: Body, *, chat: bool, model: str, session: str, decode: Callable[[int], str]
) -> dict[str, Any]:
    """Return the body of an answer.

    Args:
        answer: To the call.
        body: Of the call.
        chat: Whether it is a chat completion.
        model: Its name.
        session: In the id.
        decode: Text of one token.
    """
    wants_logprobs = body.get("logprobs") not in (None, False)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{session}-{answer.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "prompt_token_ids": answer.prompt_ids,
        "choices": [
            _choice(index, choice, chat=chat, decode=decode if wants_logprobs else None)
            for index, choice in enumerate(answer.choices)
        ],
        "usage": _usage(answer),
    }


def _usage(answer: PolicyAnswer) -> dict[str, int]:
    used = sum(len(choice.completion.token_ids) for choice in answer.choices)
    prompt = len(answer.prompt_ids)
    return {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used}


def _choice(index: int, choice: PolicyChoice, *, chat: bool, decode: Callable[[int], str] | None) -> dict[str, Any]:
    completion = choice.completion
    common = {
        "index": index,
        "finish_reason": choice.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_ids": completion.token_ids,
        "token_logprobs": completion.logprobs,
        "weight_version": completion.weight_version,
    }
    tokens = None if decode is None else [decode(token) for token in completion.token_ids]
    if not chat:
        logprobs = {"tokens": tokens, "token_logprobs": completion.logprobs, "top_logprobs": None} if tokens else None
        return {**common, "text": choice.text, "logprobs": logprobs}
    content: list[dict[str, Any]] = [
        {"token": token, "bytes": list(token.encode()), "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(tokens or (), completion.logprobs, strict=False)
    ]
    return {**common, "message": choice.message, "logprobs": None if tokens is None else {"content": content}}


def events_of(answer: Mapping[str, Any], body: Body, *, chat: bool) -> Iterator[dict[str, Any]]:
    """Yield the same answer as the events of a stream: each choice in one piece, then its end, then the usage if asked.

    Args:
        answer: From `answer_body`.
        body: Of the call.
        chat: Whether it is a chat completion.
    """
    common = {key: answer[key] for key in ("id", "created", "model")}
    common["object"] = "chat.completion.chunk" if chat else "text_completion"
    for choice in answer["choices"]:
        if chat:
            piece = {k: v for k, v in choice.items() if k not in ("message", "finish_reason")}
            yield {**common, "choices": [dict(piece, delta=_delta(choice["message"]), finish_reason=None)]}
            end = dict(index=choice["index"], delta={}, finish_reason=choice["finish_reason"])
            yield {**common, "choices": [end]}
        else:
            yield {**common, "choices": [choice]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**common, "choices": [], "usage": answer["usage"]}


def _delta(message: Body) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls = [{"index": index, **call} for index, call in enumerate(message["tool_calls"])]
    return {**message, "tool_calls": calls}


def error_body(kind: str, message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error in the form that clients of the chat API read."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
