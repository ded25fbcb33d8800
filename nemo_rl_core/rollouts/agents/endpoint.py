"""HTTP endpoint of the policy, compatible with the OpenAI API, which records the tokens of every call.

Any agent that takes a base URL can so be run against the policy and be trained. `PolicyEndpoint` serves sessions that
others open, as the environment of an agent does; `RecordingEndpoint` opens them itself over a generation backend:
`endpoint.url("task-7")` is the base URL of one session, and `endpoint.take("task-7")` gives what was sampled in it as
training sequences.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import ConfigError, DataError, DeadlineExceeded, GenerationError, MissingExtra
from nemo_rl_core.protocols.generation_backend import GenerationBackend, SamplingParams
from nemo_rl_core.protocols.policy import CallRefused, PolicyAnswer, PolicySession
from nemo_rl_core.records.seeds import stable_seed
from nemo_rl_core.rollouts.agents.endpoint_format import answer_body, call_of, error_body, events_of
from nemo_rl_core.rollouts.agents.session import EngineSession

if TYPE_CHECKING:
    from aiohttp import web

    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.records.rollout import Turn

__all__ = ["PolicyEndpoint", "RecordingEndpoint"]

logger = logging.getLogger(__name__)

_DEFAULT_SESSION = "default"
_LARGEST_BODY = 64 << 20
_SHUTDOWN_S = 1.0


class PolicyEndpoint:
    """Serves `/v1/chat/completions`, `/v1/completions` and `/v1/models` for the sessions that are open.

    A session has a base URL of its own; its name is also taken as the API key at the base URL of all. Temperature,
    top-p and top-k are those of the run, whatever the agent asks for: the trainer takes logprobs at them.
    `max_tokens`, `stop`, `seed`, `n` and `tools` are the agent's. Answers carry `token_ids` and `token_logprobs` beside
    the usual fields. With `stream` an answer comes in one piece. What cannot be served is refused with status 400.

    A client that goes away cancels its call; what it did not get is not recorded.

    Args:
        model_name: What `/v1/models` says. Any name is taken.
        host: Address to listen at; only this machine by default.
        port: 0 takes a free one.
    """

    def __init__(self, *, model_name: str = "policy", host: str = "127.0.0.1", port: int = 0) -> None:
        self.model_name = model_name
        self._host, self._port = host, port
        self._sessions: dict[str, PolicySession] = {}
        self._runner: web.AppRunner | None = None

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
            app.router.add_get(f"{prefix}/v1/models/{{model:.+}}", self._serve_model)
        app.router.add_route("*", "/{anything:.*}", self._serve_nothing)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S, handle_signals=False
        )
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
        """Stop listening and end the calls under way; may be called twice."""
        runner, self._runner = self._runner, None
        for session in self._sessions.values():
            session.close()
        if runner is not None:
            await runner.cleanup()

    def url(self, session: str | None = None) -> str:
        """Return the base URL of a session (letters, digits, `-`, `_`), or of calls that name theirs by API key."""
        path = "" if session is None else f"/s/{session}"
        return f"http://{self._host}:{self._port}{path}/v1"

    @contextmanager
    def serving(self, name: str, session: PolicySession) -> Iterator[str]:
        """Take calls of a session inside the block.

        Args:
            name: Of the session in its URL, and its API key.
            session: What answers.

        Yields:
            Its base URL.
        """
        self._sessions[name] = session
        try:
            yield self.url(name)
        finally:
            session.close()
            del self._sessions[name]

    def _session(self, name: str | None, key: str | None) -> PolicySession:
        """Return the session of a call, from its URL or its API key.

        Raises:
            CallRefused: There is no such session.
        """
        session = self._sessions.get(name or key or "")
        if session is None:
            raise CallRefused(
                f"There is no open session {name!r}."
                if name
                else "The call names no open session: take the base URL of one, or its name as the API key.",
                "session_closed",
            )
        return session

    # -- what it serves ------------------------------------------------------------------------------------

    def _model(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": 0, "owned_by": "nemo-rl"}

    async def _serve_models(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.json_response({"object": "list", "data": [self._model()]})

    async def _serve_model(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.json_response({**self._model(), "id": request.match_info["model"]})

    async def _serve_nothing(self, request: web.Request) -> web.Response:
        return _error(
            404,
            "invalid_request_error",
            f"{request.method} {request.path} is not served; there are /v1/chat/completions, /v1/completions and "
            "/v1/models.",
        )

    async def _serve_chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=True)

    async def _serve_text(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=False)

    async def _serve(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        name = request.match_info.get("session")
        key = request.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
        try:
            body = await request.json()
            call = call_of(body, chat=chat)
            session = self._session(name, key)
            answer = await session.ask(call)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return _error(400, "invalid_request_error", f"The body is not JSON: {error}")
        except DataError as error:
            return _error(400, "invalid_request_error", str(error))
        except CallRefused as error:
            status = 404 if error.code == "session_closed" else 400
            return _error(status, "invalid_request_error", str(error), error.code)
        except DeadlineExceeded as error:
            return _error(504, "timeout", str(error), "timeout")
        except GenerationError as error:
            return _error(503, "server_error", str(error), "generation_error")
        except Exception as error:
            if type(error).__module__.startswith("aiohttp"):
                raise  # a body that is too large and its like: answered by the server
            logger.exception("a call of the endpoint failed")
            return _error(500, "server_error", f"{type(error).__name__}: {error}")
        found = answer_body(
            answer, body, chat=chat, model=self.model_name, session=name or _DEFAULT_SESSION, decode=session.decode
        )
        return await _deliver(request, answer, found, body, chat=chat)


class RecordingEndpoint(PolicyEndpoint):
    """An endpoint that opens a session for whoever calls, over a generation backend.

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
        seed: With the name of a session and its prompts it decides what is sampled.
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
        super().__init__(model_name=model_name, host=host, port=port)
        self._generation = generation
        self._chat = ChatFormatter(tokenizer, chat_template_kwargs=dict(chat_template_kwargs or {}))
        self._sampling = sampling
        self._max_length = max_sequence_length
        self._timeout_s = request_timeout_s
        self._seed = seed

    def take(self, session: str = _DEFAULT_SESSION) -> list[list[Turn]]:
        """Return what was sampled in a session, a list of turns for each training sequence, and forget the session."""
        ended = self._sessions.pop(session, None)
        if ended is None:
            return []
        ended.close()
        return ended.segments

    def _session(self, name: str | None, key: str | None) -> PolicySession:
        name = name or _DEFAULT_SESSION
        if name not in self._sessions:
            self._sessions[name] = EngineSession(
                self._generation.generate,
                self._chat,
                sampling=self._sampling,
                max_sequence_length=self._max_length,
                seed=stable_seed(self._seed, name),
                name=name,
                timeout_s=self._timeout_s,
            )
        return self._sessions[name]


async def _deliver(
    request: web.Request, answer: PolicyAnswer, found: dict[str, Any], body: Mapping[str, Any], *, chat: bool
) -> web.StreamResponse:
    """Send an answer, and have it recorded unless the client is gone."""
    from aiohttp import web

    headers = {"Cache-Control": "no-cache"}
    if body.get("stream"):
        events = [json.dumps(event) for event in events_of(found, body, chat=chat)]
        content = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream"})
    else:
        content = json.dumps(found).encode()
        response = web.StreamResponse(headers={**headers, "Content-Type": "application/json; charset=utf-8"})
    response.content_length = len(content)
    answer.record()  # before it is sent: the next call may come at once
    try:
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the client is gone")
        await response.prepare(request)
        await response.write(content)
        await response.write_eof()
    except BaseException:
        answer.discard()
        raise
    return response


def _error(status: int, kind: str, message: str, code: str | None = None) -> web.Response:
    from aiohttp import web

    return web.json_response(error_body(kind, message, code), status=status)
