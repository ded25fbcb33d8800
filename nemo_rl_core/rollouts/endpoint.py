"""A generation backend as an HTTP endpoint of the OpenAI kind, which records the tokens of every call.

Any agent that takes a base URL can so be run against the policy and be trained: `endpoint.url("task-7")` is the base
URL of one session, and `endpoint.take("task-7")` gives what was sampled in it as training sequences.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import evolve

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import ConfigError, DataError, GenerationError, MissingExtra
from nemo_rl_core.protocols.generation_backend import Completion, GenerationBackend, GenerationRequest, SamplingParams
from nemo_rl_core.rollouts.recording import Asked, RecordedSession
from nemo_rl_core.rollouts.seeds import stable_seed

if TYPE_CHECKING:
    from nemo_rl_core.data.tokenizer import Tokenizer
    from nemo_rl_core.rollouts.records import Turn

__all__ = ["RecordingEndpoint"]

logger = logging.getLogger(__name__)

_DEFAULT_SESSION = "default"
_LARGEST_BODY = 64 << 20


class RecordingEndpoint:
    """Serves `/v1/chat/completions`, `/v1/completions` and `/v1/models`.

    Temperature, top-p and top-k are those of `sampling`, whatever the agent asks for: the trainer takes logprobs at
    them. `max_tokens`, `stop`, `seed` and `n` are the agent's. Answers carry token ids and logprobs beside the usual
    fields. With `stream` the answer comes in one piece. Tools go to the chat template; calls of tools are not read out
    of the answer.

    Args:
        generation: The engine.
        tokenizer: Of its model.
        sampling: How the run samples.
        max_sequence_length: Tokens of prompt and answer together.
        model_name: What `/v1/models` says.
        chat_template_kwargs: Passed to the chat template.
        host: Address to listen at; only this machine by default. There is no authentication.
        port: 0 takes a free one.
        request_timeout_s: Deadline of one call.
        seed: Of answers to calls without a seed, with session and number of the call.
    """

    def __init__(
        self,
        generation: GenerationBackend,
        tokenizer: Tokenizer,
        *,
        sampling: SamplingParams,
        max_sequence_length: int,
        model_name: str = "policy",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        request_timeout_s: float = 600.0,
        seed: int = 0,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._chat = ChatFormatter(tokenizer, chat_template_kwargs=dict(chat_template_kwargs or {}))
        self._sampling = sampling
        self._max_length = max_sequence_length
        self._model_name = model_name
        self._host, self._port = host, port
        self._timeout_s = request_timeout_s
        self._seed = seed
        self._sessions: dict[str, RecordedSession] = {}
        self._numbers = itertools.count()
        self._runner: Any = None

    # -- its life ------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Begin to listen, on the running event loop.

        Returns:
            The base URL.

        Raises:
            MissingExtra: aiohttp is not installed.
            ConfigError: The address is taken.
        """
        try:
            from aiohttp import web
        except ImportError as error:
            raise MissingExtra(
                "The endpoint needs aiohttp, which is not installed: pip install 'nemo-rl-core[endpoint]'"
            ) from error
        app = web.Application(client_max_size=_LARGEST_BODY)
        for prefix in ("", "/s/{session}"):
            app.router.add_post(f"{prefix}/v1/chat/completions", self._serve_chat)
            app.router.add_post(f"{prefix}/v1/completions", self._serve_text)
            app.router.add_get(f"{prefix}/v1/models", self._serve_models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self.stop()
            raise ConfigError(
                f"The endpoint cannot listen at {self._host}:{self._port} ({error}). Choose another port; 0 takes a "
                "free one."
            ) from error
        self._port = self._runner.addresses[0][1]
        return self.url()

    async def stop(self) -> None:
        """Stop listening; may be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def url(self, session: str | None = None) -> str:
        """Base URL of a session (letters, digits, `-` and `_`), or that of calls without one."""
        path = "" if session is None else f"/s/{session}"
        return f"http://{self._host}:{self._port}{path}/v1"

    def take(self, session: str = _DEFAULT_SESSION) -> list[list[Turn]]:
        """What was sampled in a session, which is forgotten: a list of turns for each training sequence."""
        recorded = self._sessions.pop(session, None)
        return recorded.segments if recorded is not None else []

    # -- what it serves ------------------------------------------------------------------------------------

    async def _serve_models(self, request: Any) -> Any:
        from aiohttp import web

        model = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "nemo-rl"}
        return web.json_response({"object": "list", "data": [model]})

    async def _serve_chat(self, request: Any) -> Any:
        return await self._serve(request, chat=True)

    async def _serve_text(self, request: Any) -> Any:
        return await self._serve(request, chat=False)

    async def _serve(self, request: Any, *, chat: bool) -> Any:
        from aiohttp import web

        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise DataError("The body must be a JSON object.")
            session = request.match_info.get("session", _DEFAULT_SESSION)
            answer = await asyncio.wait_for(self._answer(body, session, chat=chat), self._timeout_s)
        except (json.JSONDecodeError, DataError) as error:
            return _error(400, "invalid_request_error", str(error))
        except GenerationError as error:
            return _error(400, "invalid_request_error", str(error), code="generation_error")
        except TimeoutError:
            return _error(504, "timeout", f"No answer within {self._timeout_s:g} s (request_timeout_s).")
        except Exception as error:
            logger.exception("a call of the endpoint failed")
            return _error(500, "server_error", f"{type(error).__name__}: {error}")
        if body.get("stream"):
            return await _stream(request, answer, chat=chat)
        return web.json_response(answer)

    async def _answer(self, body: dict[str, Any], session: str, *, chat: bool) -> dict[str, Any]:
        recorded = self._sessions.setdefault(session, RecordedSession(self._chat))
        asked = recorded.ask_chat(_messages(body)) if chat else recorded.ask_tokens(self._prompt_ids(body))
        sampling = self._sampling_for(body, asked)
        number = next(self._numbers)
        calls = [self._sample(asked, sampling, f"{session}/{number}/{i}") for i in range(_count(body))]
        completions = await asyncio.gather(*calls)
        choices = []
        for index, completion in enumerate(completions):
            text = self._text(completion)
            recorded.answer(asked, completion, text)
            choices.append(_choice(index, completion, text, chat=chat))
        used = sum(len(c.token_ids) for c in completions)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{session}-{number}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model_name,
            "prompt_token_ids": asked.prompt_ids,
            "choices": choices,
            "usage": {
                "prompt_tokens": len(asked.prompt_ids),
                "completion_tokens": used,
                "total_tokens": len(asked.prompt_ids) + used,
            },
        }

    async def _sample(self, asked: Asked, sampling: SamplingParams, name: str) -> Completion:
        if sampling.seed is None or not name.endswith("/0"):
            sampling = evolve(sampling, seed=stable_seed(self._seed, name, sampling.seed or 0))
        request = GenerationRequest(request_id=name, prompt_ids=asked.prompt_ids, sampling=sampling)
        return await self._generation.generate(request)

    def _sampling_for(self, body: Mapping[str, Any], asked: Asked) -> SamplingParams:
        room = self._max_length - len(asked.prompt_ids)
        if room < 1:
            raise DataError(
                f"The prompt has {len(asked.prompt_ids)} tokens and leaves no room in a context of {self._max_length} "
                "(context_length_exceeded)."
            )
        asked_for = body.get("max_completion_tokens") or body.get("max_tokens") or self._sampling.max_new_tokens
        stop = body.get("stop") or ()
        try:
            return evolve(
                self._sampling,
                max_new_tokens=max(1, min(int(asked_for), room)),
                stop=(*self._sampling.stop, *([stop] if isinstance(stop, str) else stop)),
                seed=None if body.get("seed") is None else int(body["seed"]),
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"max_tokens and seed must be whole numbers, stop a string or a list: {error}") from error

    def _prompt_ids(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt
        raise DataError("prompt must be a string or a list of token ids; several prompts take several calls.")

    def _text(self, completion: Completion) -> str:
        """What the agent is told: without special tokens, up to the stop string."""
        text = completion.text if completion.text is not None else self._chat.decode(completion.token_ids)
        if isinstance(completion.stop_reason, str):
            text = text.partition(completion.stop_reason)[0]
        return text


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise DataError("messages must be a list.")
    return messages


def _count(body: Mapping[str, Any]) -> int:
    count = body.get("n") or 1
    if type(count) is not int or not 1 <= count <= 128:
        raise DataError("n must be a whole number from 1 to 128.")
    return count


def _choice(index: int, completion: Completion, text: str, *, chat: bool) -> dict[str, Any]:
    reason = "length" if completion.finish_reason == "length" else "stop"
    common = {
        "index": index,
        "finish_reason": reason,
        "stop_reason": completion.stop_reason,
        "token_ids": completion.token_ids,
        "weight_version": completion.weight_version,
    }
    if not chat:
        return {**common, "text": text, "logprobs": {"token_logprobs": completion.logprobs}}
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    content = [{"token": f"token_id:{token}", "logprob": logprob, "top_logprobs": []} for token, logprob in pairs]
    return {**common, "message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}


def _error(status: int, kind: str, message: str, *, code: str | None = None) -> Any:
    from aiohttp import web

    if "context_length_exceeded" in message:
        code = "context_length_exceeded"
    return web.json_response({"error": {"message": message, "type": kind, "code": code}}, status=status)


async def _stream(request: Any, answer: dict[str, Any], *, chat: bool) -> Any:
    """The whole answer as the only event of a stream."""
    from aiohttp import web

    if chat:
        choices = [choice | dict(delta=choice["message"]) for choice in answer["choices"]]
        answer = {**answer, "object": "chat.completion.chunk", "choices": choices}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    with suppress(ConnectionError):
        await response.write(f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode())
        await response.write_eof()
    return response
