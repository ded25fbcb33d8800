"""An agent with a base URL: what it is told, and what is kept to train on."""

from __future__ import annotations

import asyncio
import json

import pytest
from attrs import evolve

from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.rollouts.agents.endpoint import RecordingEndpoint
from nemo_rl_core.testing import ScriptedGeneration
from nemo_rl_core.testing.scripted_generation import ScriptedReply

aiohttp = pytest.importorskip("aiohttp")

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


OFFERS_TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny", chat_template=TEMPLATE)


@pytest.fixture
async def serve(tokenizer):
    running = []

    async def make(script, *, with_tools=False, **changes):
        used = load_tokenizer("scratch:qwen2-tiny", chat_template=OFFERS_TOOLS + TEMPLATE) if with_tools else tokenizer
        generation = ScriptedGeneration(script, used)
        settings = {"sampling": SamplingParams(max_new_tokens=200), "max_sequence_length": 300, **changes}
        endpoint = RecordingEndpoint(generation, used, **settings)
        await endpoint.start()
        running.append(endpoint)
        return endpoint, generation

    yield make
    for endpoint in running:
        await endpoint.stop()


async def post(url, path, **body):
    async with aiohttp.ClientSession() as client, client.post(f"{url}/{path}", json=body) as response:
        text = await response.text()
        return response.status, json.loads(text) if text.startswith("{") else text


async def chat(url, *contents, **body):
    """A conversation of alternating user and assistant messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    status, found = await post(url, "chat/completions", messages=messages, model="any", **body)
    assert status == 200, found
    return found


def in_turn(*texts):
    """A script that says one text after the other."""
    left = iter(texts)
    return lambda request: next(left)


def token_ids(segment):
    return [token for turn in segment for token in turn.token_ids]


async def test_an_answer_carries_text_tokens_and_logprobs_and_is_recorded(serve, tokenizer):
    endpoint, generation = await serve("four")
    found = await chat(endpoint.url("a"), "2+2?", logprobs=True)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "four"}
    assert found["usage"]["completion_tokens"] == len(choice["token_ids"])
    ((prompt, sampled),) = endpoint.take("a")
    assert prompt.token_ids == found["prompt_token_ids"] == generation.requests[0].prompt_ids
    assert tokenizer.decode(prompt.token_ids) == "<user>2+2?|<assistant>"
    assert (prompt.sampled, sampled.sampled) == (False, True)
    assert sampled.token_ids == choice["token_ids"]
    assert sampled.logprobs == [entry["logprob"] for entry in choice["logprobs"]["content"]] == choice["token_logprobs"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]).startswith("four")
    assert endpoint.take("a") == []


async def test_a_conversation_is_one_sequence_of_the_tokens_that_were_sampled(serve, tokenizer):
    endpoint, generation = await serve(in_turn("one", "two", "three"))
    url = endpoint.url("a")
    await chat(url, "x")
    await chat(url, "x", "one", "y")
    await chat(url, "x", "one", "y", "two", "z")
    (segment,) = endpoint.take("a")
    assert [turn.sampled for turn in segment] == [False, True] * 3
    third = generation.requests[2]
    assert token_ids(segment[:-1]) == list(third.prompt_ids)
    assert third.prompt_ids[: len(generation.requests[1].prompt_ids)] == generation.requests[1].prompt_ids


async def test_sessions_are_kept_apart(serve):
    endpoint, _ = await serve(in_turn("one", "two", "three"))
    await chat(endpoint.url("a"), "x")
    await chat(endpoint.url("b"), "x", "one", "y")  # continues nothing of its own session
    await chat(endpoint.url(), "x")
    assert [len(endpoint.take(name)) for name in ("a", "b", "default")] == [1, 1, 1]


@pytest.mark.parametrize("second", [("x",), ("x", "uno", "y"), ("other", "one", "y")])
async def test_a_retry_or_a_rewritten_history_begins_a_sequence_of_its_own(serve, second):
    endpoint, _ = await serve(in_turn("one", "two"))
    await chat(endpoint.url("a"), "x")
    await chat(endpoint.url("a"), *second)
    segments = endpoint.take("a")
    assert len(segments) == 2
    assert [turn.sampled for turn in segments[1]] == [False] * len(second) + [True]


async def test_of_several_answers_each_is_trained_once(serve):
    endpoint, _ = await serve(in_turn("one", "two", "three", "four"))
    await chat(endpoint.url("a"), "x")
    found = await chat(endpoint.url("a"), "x", "one", "y", n=3)
    assert [c["message"]["content"] for c in found["choices"]] == ["two", "three", "four"]
    segments = endpoint.take("a")
    sampled = [turn.message["content"] for segment in segments for turn in segment if turn.sampled]
    assert sorted(sampled) == ["four", "one", "three", "two"]
    assert len({tuple(token_ids(segment[:3])) for segment in segments}) == 1


async def test_temperature_is_the_runs_and_lengths_are_the_agents(serve):
    endpoint, generation = await serve("a long answer", sampling=SamplingParams(temperature=0.8, max_new_tokens=64))
    await chat(endpoint.url(), "x", temperature=0.1, top_p=0.5, max_tokens=3, seed=11, stop="z")
    sampling = generation.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.stop) == (0.8, 1.0, 3, ("z",))


async def test_what_is_drawn_depends_on_session_and_prompt_and_not_on_the_order_of_calls(serve):
    seeds = []
    for calls in (["a x", "a x", "a y", "b x"], ["b x", "a y", "a x", "a x"]):
        endpoint, generation = await serve("one")
        found = {}
        for session, content in map(str.split, calls):
            await chat(endpoint.url(session), content)
            found.setdefault((session, content), []).append(generation.requests[-1].sampling.seed)
        seeds.append(found)
    assert seeds[0] == seeds[1]
    assert len({seed for drawn in seeds[0].values() for seed in drawn}) == 4  # a second try draws again


async def test_a_seed_of_the_agent_makes_calls_equal_within_its_session_alone(serve):
    endpoint, generation = await serve("one")
    for session in ("a", "a", "b"):
        await chat(endpoint.url(session), "x", seed=11)
    first, again, other = [request.sampling.seed for request in generation.requests]
    assert first == again != other


async def test_the_agent_does_not_see_the_stop_string_and_the_record_has_it(serve, tokenizer):
    endpoint, _ = await serve("yes###no")
    found = await chat(endpoint.url("a"), "x", stop=["###"])
    assert found["choices"][0]["message"]["content"] == "yes"
    ((_, sampled),) = endpoint.take("a")
    assert tokenizer.decode(sampled.token_ids) == "yes###"


async def test_plain_completions_continue_by_their_tokens(serve, tokenizer):
    endpoint, _ = await serve(in_turn("one", "two"))
    status, first = await post(endpoint.url("a"), "completions", prompt="ab")
    assert (status, first["choices"][0]["text"]) == (200, "one")
    longer = [*first["prompt_token_ids"], *first["choices"][0]["token_ids"], *tokenizer.encode("cd")]
    await post(endpoint.url("a"), "completions", prompt=longer)
    (segment,) = endpoint.take("a")
    assert [turn.sampled for turn in segment] == [False, True, False, True]
    assert segment[2].token_ids == tokenizer.encode("cd")


async def test_a_stream_is_the_answer_and_its_end(serve):
    endpoint, _ = await serve("hello")
    messages = [{"role": "user", "content": "x"}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, text = await post(endpoint.url(), "chat/completions", messages=messages, **options)
    *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    first, end, usage = map(json.loads, events)
    assert first["choices"][0]["delta"]["content"] == "hello"
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(first["choices"][0]["token_ids"]))
    assert last == "[DONE]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages must be a list"),
        ({"messages": []}, "no messages"),
        ({"messages": ["x"]}, "a mapping with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images are not served"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "leaves no room"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 0.5}, "n must be"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}, "whole number"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, "Not served"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["add"]}, "tools must be a list of"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [ADD]}, "does not render tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a function that has a name"),
    ],
)
async def test_what_cannot_be_served_is_an_answer_of_status_400(serve, body, said):
    endpoint, _ = await serve("hello")
    status, found = await post(endpoint.url("a"), "chat/completions", **body)
    assert status == 400
    assert said in found["error"]["message"]
    assert endpoint.take("a") == []


async def test_a_failing_engine_is_an_error_of_the_call_alone(serve):
    endpoint, _ = await serve(in_turn(ScriptedReply(error=GenerationError("it is asleep")), "fine"))
    messages = [{"role": "user", "content": "x"}]
    status, found = await post(endpoint.url(), "chat/completions", messages=messages)
    assert (status, found["error"]["message"]) == (503, "it is asleep")
    assert (await chat(endpoint.url(), "x"))["choices"][0]["message"]["content"] == "fine"


async def test_a_hanging_engine_ends_the_call_at_its_deadline(serve):
    endpoint, generation = await serve(lambda request: ScriptedReply(hang=True), request_timeout_s=0.2)
    status, found = await post(endpoint.url(), "chat/completions", messages=[{"role": "user", "content": "x"}])
    assert status == 504
    assert "within 0.2 s" in found["error"]["message"]
    assert generation.num_cancelled == 1


async def test_a_client_that_goes_away_ends_its_call_and_its_retry_is_trained_once(serve):
    started = asyncio.Event()

    def script(request):
        started.set()
        return ScriptedReply(hang=True) if len(generation.requests) == 1 else "fine"

    endpoint, generation = await serve(script)
    call = asyncio.create_task(chat(endpoint.url("a"), "x"))
    await started.wait()
    call.cancel()
    async with asyncio.timeout(5):
        while generation.num_cancelled == 0:
            await asyncio.sleep(0.01)
    await chat(endpoint.url("a"), "x")
    ((_, sampled),) = endpoint.take("a")
    assert sampled.message["content"] == "fine"
    first, retry = generation.requests
    assert first.sampling.seed == retry.sampling.seed  # a try that nobody got is drawn again


async def test_an_answer_that_cannot_be_delivered_is_taken_out_of_the_record(serve, monkeypatch):
    endpoint, _ = await serve(in_turn("one", "lost", "two"))
    await chat(endpoint.url("a"), "x")
    write = aiohttp.web.StreamResponse.write

    async def broken(self, data):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(aiohttp.web.StreamResponse, "write", broken)
    with pytest.raises(aiohttp.ClientError):
        await chat(endpoint.url("a"), "x", "one", "y")
    monkeypatch.setattr(aiohttp.web.StreamResponse, "write", write)
    await chat(endpoint.url("a"), "x", "one", "y")
    (segment,) = endpoint.take("a")
    assert [turn.message["content"] for turn in segment] == ["x", "one", "y", "two"]


async def test_an_aborted_completion_is_an_error_and_no_answer(serve, tokenizer, monkeypatch):
    endpoint, generation = await serve("half of it")
    whole = generation.generate

    async def aborted(request):
        return evolve(await whole(request), finish_reason="abort")

    monkeypatch.setattr(generation, "generate", aborted)
    status, found = await post(endpoint.url("a"), "chat/completions", messages=[{"role": "user", "content": "x"}])
    assert (status, found["error"]["code"]) == (503, "generation_error")
    assert endpoint.take("a") == []


CALL = '<tool_call>{"name":"add","arguments":{"a": 2,"b":3}}</tool_call>'


async def test_calls_of_tools_are_told_as_such_and_trained_as_they_were_sampled(serve):
    endpoint, generation = await serve(in_turn(f"I add. {CALL}", "five", "six"), with_tools=True)
    url, tokenizer = endpoint.url("a"), endpoint._chat.tokenizer
    messages = [{"role": "user", "content": "2+3"}]
    _, found = await post(url, "chat/completions", messages=messages, tools=[ADD])
    choice = found["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I add.")
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 2, "b": 3}'})
    # A client may write the same call down in another way.
    rewritten = {**call, "function": {"name": "add", "arguments": '{"b":3,"a":2}'}}
    messages += [
        {**choice["message"], "tool_calls": [rewritten], "refusal": None},
        {"role": "tool", "tool_call_id": call["id"], "content": "5"},
    ]
    _, second = await post(url, "chat/completions", messages=messages, tools=[ADD])
    assert second["choices"][0]["finish_reason"] == "stop"
    (segment,) = endpoint.take("a")
    assert tokenizer.decode(token_ids(segment)) == (
        f"[add]<user>2+3|<assistant>I add. {CALL}<|end|>|<tool>5|<assistant>five<|end|>"
    )
    assert [turn.sampled for turn in segment] == [False, True, False, True]
    assert generation.requests[1].prompt_ids == token_ids(segment[:3])


async def test_other_tools_or_a_call_that_cannot_be_read(serve):
    broken = "<tool_call>{add 2}</tool_call>"
    endpoint, _ = await serve(in_turn(broken, "fine", f"{CALL}{CALL}"), with_tools=True)
    url = endpoint.url("a")
    messages = [{"role": "user", "content": "2+3"}]
    _, found = await post(url, "chat/completions", messages=messages, tools=[ADD])
    assert found["choices"][0]["message"] == {"role": "assistant", "content": broken}
    longer = [*messages, found["choices"][0]["message"], {"role": "user", "content": "no"}]
    await post(url, "chat/completions", messages=longer, tools=[ADD], tool_choice="none")  # another prompt
    assert len(endpoint.take("a")) == 2
    _, found = await post(url, "chat/completions", messages=messages, tools=[ADD], parallel_tool_calls=False)
    assert len(found["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_taken_port_says_so(serve):
    endpoint, _ = await serve("hello")
    port = int(endpoint.url().split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="Choose another port"):
        await serve("hello", port=port)
