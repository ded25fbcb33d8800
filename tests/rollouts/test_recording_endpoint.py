"""An agent with a base URL: what it is told, and what is kept to train on."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.rollouts.endpoint import RecordingEndpoint
from nemo_rl_core.testing import ScriptedGeneration
from nemo_rl_core.testing.scripted_generation import ScriptedReply

aiohttp = pytest.importorskip("aiohttp")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny", chat_template=TEMPLATE)


@pytest.fixture
async def serve(tokenizer):
    running = []

    async def make(script, **changes):
        generation = ScriptedGeneration(script, tokenizer)
        settings = {"sampling": SamplingParams(max_new_tokens=32), "max_sequence_length": 200, **changes}
        endpoint = RecordingEndpoint(generation, tokenizer, **settings)
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
    found = await chat(endpoint.url("a"), "2+2?")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "four"}
    assert found["usage"]["completion_tokens"] == len(choice["token_ids"])
    ((prompt, sampled),) = endpoint.take("a")
    assert prompt.token_ids == found["prompt_token_ids"] == generation.requests[0].prompt_ids
    assert tokenizer.decode(prompt.token_ids) == "<user>2+2?|<assistant>"
    assert (prompt.sampled, sampled.sampled) == (False, True)
    assert sampled.token_ids == choice["token_ids"]
    assert sampled.logprobs == [entry["logprob"] for entry in choice["logprobs"]["content"]]
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
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed, sampling.stop) == (
        0.8, 1.0, 3, 11, ("z",),
    )  # fmt: skip


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


async def test_a_stream_is_one_event_and_its_end(serve):
    endpoint, _ = await serve("hello")
    _, text = await post(endpoint.url(), "chat/completions", messages=[{"role": "user", "content": "x"}], stream=True)
    first, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert json.loads(first)["choices"][0]["delta"]["content"] == "hello"
    assert last == "[DONE]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages must be a list"),
        ({"messages": []}, "no messages"),
        ({"messages": ["x"]}, "a mapping with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images are not served"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "leaves no room"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 0.5}, "n must be"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}, "whole numbers"),
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
    assert (status, found["error"]["message"]) == (400, "it is asleep")
    assert (await chat(endpoint.url(), "x"))["choices"][0]["message"]["content"] == "fine"


async def test_a_hanging_engine_ends_the_call_at_its_deadline(serve):
    endpoint, generation = await serve(lambda request: ScriptedReply(hang=True), request_timeout_s=0.2)
    status, found = await post(endpoint.url(), "chat/completions", messages=[{"role": "user", "content": "x"}])
    assert status == 504
    assert "request_timeout_s" in found["error"]["message"]
    assert generation.num_cancelled == 1


async def test_a_taken_port_says_so(serve):
    endpoint, _ = await serve("hello")
    port = int(endpoint.url().split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="Choose another port"):
        await serve("hello", port=port)
