"""Agents of every kind in real rollouts: what they are told, what is recorded, and how they may fail."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request

import pytest

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing import ScriptedGeneration
from nemo_rl_core.testing.conformance.frame._pool import shared_pool
from nemo_rl_core.testing.scripted_generation import ScriptedReply
from nemo_rl_plugins_env_agent import AgentConfig, AgentEnvironment, agent_environment
from nemo_rl_plugins_env_agent.commands import read_output

TASK = {"prompt": "2+3", "answer": "5"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny", chat_template=TEMPLATE)


@pytest.fixture
def play(tokenizer):
    """Runs a group of rollouts on an event loop of its own; gives them and the engine."""

    def run(environment, script="five", *, group_size=1, **limits):
        generation = ScriptedGeneration(script, tokenizer)
        limits = {"max_turns": 4, "generation_timeout_s": 5.0, "environment_timeout_s": 5.0, **limits}
        engine = RolloutEngine(
            generation=generation,
            environment=environment,
            chat=ChatFormatter(tokenizer),
            config=RolloutConfig(**limits),
            sampling=SamplingParams(max_new_tokens=100),
            pool=shared_pool(),
            seed=3,
            max_sequence_length=400,
        )
        group = asyncio.run(engine.run_group(0, "t", TASK, group_size=group_size, weight_version=0))
        return group, generation

    return run


def post(base_url, messages, key="", **body):
    """One call, without a client library."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"messages": messages, **body}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)["choices"][0]["message"]


def user(text):
    return {"role": "user", "content": text}


# -- functions -----------------------------------------------------------------------------------------------


def use_a_tool(task, base_url):
    """Has the policy call a tool, tells it the result, and returns its answer."""
    messages = [user(task["prompt"])]
    while True:
        message = post(base_url, messages, tools=[ADD])
        messages.append(message)
        if not message.get("tool_calls"):
            return message["content"]
        for call in message["tool_calls"]:
            numbers = json.loads(call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(sum(numbers.values()))})


def with_a_tool(request):
    return f"Let me add. {CALL}" if request.order[-1] == 0 else "5"


async def exact(response, answer):
    return float(response == answer)


def test_what_an_agent_samples_with_tools_is_one_sequence_with_the_reward_of_its_answer(play, tokenizer):
    group, generation = play(agent_environment(use_a_tool, reward=exact), with_a_tool, group_size=3)
    for rollout in group.rollouts:
        assert rollout.error is None
        (segment,) = rollout.segments
        assert [turn.sampled for turn in segment] == [False, True, False, True]
        text = tokenizer.decode([token for turn in segment for token in turn.token_ids])
        assert text == f"[add]<user>2+3|<assistant>Let me add. {CALL}<|end|>|<tool>5|<assistant>5<|end|>"
        assert (rollout.rewards, rollout.terminated, rollout.truncated) == ({"reward": 1.0}, True, False)
    assert len({request.sampling.seed for request in generation.requests}) == 6
    batch = batch_from_groups([group])
    sampled = [t for r in group.rollouts for turn in r.segments[0] if turn.sampled for t in turn.logprobs]
    assert batch["rollout_logprobs"][batch["loss_mask"]].tolist() == pytest.approx(sampled)


async def talk(base_url, prompt, seed):
    """Two conversations at the same time, by a client that blocks: the loop of the rollouts goes on meanwhile."""
    calls = [asyncio.to_thread(post, base_url, [user(prompt + suffix)]) for suffix in "ab"]
    found = await asyncio.gather(*calls)
    return {"rewards": {"length": len(found), "seeded": seed >= 0}, "info": {"said": found[0]["content"]}}


def test_an_async_agent_with_named_rewards_and_conversations_at_once(play):
    (rollout,) = play(agent_environment(talk))[0].rollouts
    assert rollout.rewards == {"length": 2.0, "seeded": 1.0}
    assert (rollout.info["said"], len(rollout.segments)) == ("five", 2)


def test_the_key_alone_names_the_session(play):
    def agent(base_url, api_key):
        return len(post(base_url.partition("/s/")[0] + "/v1", [user("x")], api_key)["content"])

    assert play(agent_environment(agent))[0].rewards == [4.0]


def test_the_openai_client_with_tools_and_a_stream(play):
    openai = pytest.importorskip("openai")

    def agent(base_url, api_key, model, prompt):
        with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            ask = client.chat.completions.create
            assert [m.id for m in client.models.list()] == [model]
            messages = [user(prompt)]
            said = ask(model=model, messages=messages, tools=[ADD]).choices[0].message
            assert json.loads(said.tool_calls[0].function.arguments) == {"a": 2, "b": 3}
            messages += [said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "5"}]
            with ask(model=model, messages=messages, tools=[ADD], stream=True) as events:
                text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
            with pytest.raises(openai.BadRequestError, match="response_format"):
                ask(model=model, messages=messages, response_format={"type": "json_object"})
            return float(text == "5")

    group, _ = play(agent_environment(agent), with_a_tool)
    (rollout,) = group.rollouts
    assert (rollout.error, rollout.reward, len(rollout.segments)) == (None, 1.0, 1)


# -- programs ------------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys, urllib.request
task = json.load(sys.stdin)
body = json.dumps({"messages": [{"role": "user", "content": task["prompt"]}], "model": os.environ["OPENAI_MODEL"]})
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body.encode(),
                                 {"Content-Type": "application/json"})
said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
print("thinking")
print(json.dumps({"answer": said, "info": {"extra": os.environ["EXTRA"]}}))
"""


def program(text, **options):
    config = AgentConfig(command=(sys.executable, "-c", text), env={"EXTRA": "7"}, **options)
    return lambda context: AgentEnvironment(config, context)


def test_a_program_gets_the_task_and_prints_its_answer(play):
    from nemo_rl_core.schema import ComponentChoice

    group, _ = play(program(PROGRAM, reward=ComponentChoice(name=exact)), "5", group_size=2)
    assert [r.error for r in group.rollouts] == [None, None]
    assert (group.rewards, group.rollouts[0].info["extra"]) == ([1.0, 1.0], "7")


def test_a_program_is_killed_at_its_deadline_with_all_it_started(play, tmp_path):
    pids = tmp_path / "pids"
    text = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)"
    )
    group, _ = play(program(text, timeout_s=1.5))
    assert "did not end within 1.5 s" in group.rollouts[0].error.message
    for pid in map(int, pids.read_text().split()):
        assert _has_ended(pid)


def _has_ended(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":  # killed; whoever adopted it has not looked yet
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit('no such key')", "ended with status 1: no such key"),
        (
            "print('x' * 100000); import sys; print('y' * 100000, file=sys.stderr); sys.exit(3)",
            "ended with status 3: y",
        ),
        ("print(1)", "made no call of the policy"),
    ],
)
def test_a_program_that_fails_fails_its_rollout(play, text, said):
    assert said in play(program(text))[0].rollouts[0].error.message


@pytest.mark.parametrize(
    ("text", "found"),
    [("log\n0.5\n", 0.5), ('{"reward": 1}', {"reward": 1}), ("a\nb\n", "a\nb"), ("", ""), ("[1]", "[1]")],
)
def test_what_a_program_prints(text, found):
    assert read_output(text) == found


# -- failures ------------------------------------------------------------------------------------------------


def raises(base_url):
    post(base_url, [user("x")])
    raise KeyError("missing")


def exits(base_url):
    sys.exit("enough")


async def cancels():
    raise asyncio.CancelledError


def returns_nothing(base_url):
    post(base_url, [user("x")])


def answers(base_url):
    return post(base_url, [user("x")])["content"]


def needs_more(base_url, tools):
    return 1.0


def makes_no_call():
    return 1.0


def never_stops(base_url):
    for _ in range(10):
        post(base_url, [user("x")])


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        (raises, r"raises raised KeyError: 'missing' (test_agent_environment.py:"),
        (exits, "raised SystemExit: enough"),
        (cancels, "cancelled from inside"),
        (returns_nothing, "returned NoneType"),
        (answers, "nothing to score it"),
        (needs_more, "has the argument 'tools'"),
        (makes_no_call, "made no call of the policy"),
        (never_stops, "has had its 4 calls (rollouts.max_turns)"),
        ("no_such_module:solve", "cannot be loaded"),
    ],
)
def test_an_agent_that_fails_fails_its_rollout_and_is_named(play, agent, said):
    (rollout,) = play(agent_environment(agent))[0].rollouts
    assert said in rollout.error.message
    assert rollout.rewards == {}
    assert getattr(agent, "__name__", agent) in rollout.error.message or agent is makes_no_call


def test_one_failure_leaves_the_others_of_the_group_alone(play):
    def agent(base_url):
        said = post(base_url, [user("x")])["content"]
        return 1 / (said != "bad")

    group, _ = play(agent_environment(agent), lambda r: "bad" if r.order[1] == 1 else "good", group_size=3)
    assert [r.failed for r in group.rollouts] == [False, True, False]


def test_a_hanging_agent_is_left_behind_and_answered_no_more(play):
    late = []

    def agent(base_url):
        post(base_url, [user("x")])
        time.sleep(1.0)
        try:
            post(base_url, [user("y")])
        except (urllib.error.URLError, ConnectionError) as error:
            late.append(error)

    group, generation = play(agent_environment(agent, timeout_s=0.5))
    assert "did not end within 0.5 s" in group.rollouts[0].error.message
    for _ in range(100):
        if late:
            break
        time.sleep(0.05)
    assert late and len(generation.requests) == 1


def test_a_failure_may_have_a_reward(play):
    (rollout,) = play(agent_environment(raises, failure_reward=-1))[0].rollouts
    assert (rollout.error, rollout.rewards, rollout.truncated) == (None, {"reward": -1.0}, True)
    assert rollout.info["agent_failed"] == 1.0 and "KeyError" in rollout.info["agent_error"]


def test_an_engine_that_fails_is_not_the_agents_failure(play):
    def agent(base_url):
        post(base_url, [user("x")])
        try:
            post(base_url, [user("y")])
        except urllib.error.HTTPError as error:
            assert error.code == 503
        return 0.0

    def script(request):
        return "fine" if request.order[-1] == 0 else ScriptedReply(error=GenerationError("out of memory"))

    (rollout,) = play(agent_environment(agent, failure_reward=-1), script)[0].rollouts
    assert (rollout.error.type, rollout.rewards) == ("GenerationError", {})
    assert "out of memory" in rollout.error.message


def test_a_rollout_that_ran_out_of_context_is_truncated(play):
    def agent(base_url):
        post(base_url, [user("x")])
        try:
            post(base_url, [user("y" * 500)])
        except urllib.error.HTTPError as error:
            assert json.load(error)["error"]["code"] == "context_length_exceeded"
        return 0.5

    (rollout,) = play(agent_environment(agent))[0].rollouts
    assert (rollout.rewards, rollout.truncated) == ({"reward": 0.5}, True)


def test_the_endpoint_ends_with_the_run(play):
    urls = []

    def agent(base_url):
        urls.append(base_url)
        return len(post(base_url, [user("x")])["content"])

    for _ in range(2):
        assert len(play(agent_environment(agent), group_size=3)[0].valid) == 3
        with pytest.raises(urllib.error.URLError):
            post(urls[-1], [user("x")])
    assert len(set(urls)) == 6
    assert len({url.partition("/s/")[0] for url in urls[:3]}) == 1


def test_mistakes_in_the_options():
    with pytest.raises(ConfigError, match="Both agent and command"):
        AgentConfig(agent=raises, command=("x",))
    with pytest.raises(ConfigError, match="has no agent"):
        AgentEnvironment(AgentConfig(), None)
