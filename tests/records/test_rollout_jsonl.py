from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.jsonl import group_from_dict, group_to_dict, read_groups, write_groups
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn

text = st.text(max_size=12)
numbers = st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]), "content": text}, optional={"tool_call_id": text}
)
versions = st.none() | st.integers(0, 9)
given_turns = st.builds(
    Turn, message=messages, token_ids=st.lists(st.integers(0, 10**6), max_size=5), sampled=st.just(False)
)


@st.composite
def sampled_turns(draw):
    token_ids = draw(st.lists(st.integers(0, 10**6), max_size=5))
    return Turn(
        message={"role": "assistant", "content": draw(text)},
        token_ids=token_ids,
        sampled=True,
        logprobs=draw(st.lists(numbers, min_size=len(token_ids), max_size=len(token_ids))),
        finish_reason=draw(st.sampled_from([None, "stop", "length", "abort"])),
        weight_version=draw(versions),
        last_weight_version=draw(versions),
    )


rollouts = st.builds(
    Rollout,
    rollout_id=text,
    task_id=text,
    index=st.integers(0, 9),
    seed=st.integers(0, 2**63 - 1),
    task=st.dictionaries(text, plain, max_size=3),
    segments=st.lists(st.lists(given_turns | sampled_turns(), max_size=4), max_size=3),
    rewards=st.dictionaries(text, numbers, max_size=3),
    terminated=st.booleans(),
    truncated=st.booleans(),
    error=st.none()
    | st.builds(
        RolloutError, stage=st.sampled_from(["reset", "generate", "step", "score", "close"]), type=text, message=text
    ),
    info=st.dictionaries(text, plain, max_size=3),
    timing_s=st.dictionaries(text, numbers, max_size=3),
)
groups = st.builds(
    RolloutGroup,
    group_id=st.integers(0, 3),
    task_id=text,
    weight_version=st.integers(0, 3),
    rollouts=st.lists(rollouts, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written=st.lists(groups, max_size=3))
def test_groups_come_back_exactly(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("jsonl") / "rollouts.jsonl"
    write_groups(path, written)
    assert read_groups(path) == written
    assert [group_from_dict(json.loads(json.dumps(group_to_dict(g)))) for g in written] == written


def sample_group():
    prompt = [
        Turn(message={"role": "system", "content": "be brief"}, token_ids=[], sampled=False),
        Turn(message={"role": "user", "content": "2+2"}, token_ids=[2, 7, 3], sampled=False),
    ]
    answer = Turn(
        message={"role": "assistant", "content": "5"}, token_ids=[30, 1], sampled=True, logprobs=[-0.1, -1e-17]
    )
    reply = Turn(message={"role": "user", "content": "wrong"}, token_ids=[2, 9, 3], sampled=False)
    again = Turn(message={"role": "assistant", "content": "4"}, token_ids=[29, 1], sampled=True, logprobs=[-0.3, -0.2])
    rollout = Rollout(
        rollout_id="t/0",
        task_id="t",
        index=0,
        seed=1,
        task={"prompt": "2+2"},
        segments=[[*prompt, answer, reply, again]],
        rewards={"correct": 1.0, "format": 0.5},
    )
    return RolloutGroup(group_id=7, task_id="t", rollouts=[rollout], weight_version=3)


def test_lines_have_the_keys_that_gym_tools_read(tmp_path):
    write_groups(tmp_path / "r.jsonl", [sample_group()])
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["_ng_task_index"], row["_ng_rollout_index"], row["reward"]) == (7, 0, 1.5)
    assert [(m["type"], m["role"], m["content"]) for m in row["responses_create_params"]["input"]] == [
        ("message", "system", "be brief"),
        ("message", "user", "2+2"),
    ]
    first, reply, second = row["response"]["output"]
    assert first["content"] == [{"type": "output_text", "text": "5"}]
    assert first["prompt_token_ids"] == [2, 7, 3] and first["generation_token_ids"] == [30, 1]
    assert first["generation_log_probs"] == [-0.1, -1e-17]
    assert reply["role"] == "user"
    assert second["prompt_token_ids"] == [2, 7, 3, 30, 1, 2, 9, 3]


def test_our_lines_read_as_gym_rows_have_the_same_tokens(tmp_path):
    write_groups(tmp_path / "r.jsonl", [sample_group()])
    row = json.loads((tmp_path / "r.jsonl").read_text())
    del row["nemo_rl_record"]  # what another tool might drop
    (tmp_path / "gym.jsonl").write_text(json.dumps(row) + "\n")
    (group,) = read_groups(tmp_path / "gym.jsonl")
    (rollout,) = group.rollouts
    original = sample_group().rollouts[0].segments[0]
    assert [(t.message["content"], t.token_ids, t.sampled, t.logprobs) for t in rollout.segments[0]] == [
        (t.message["content"], t.token_ids, t.sampled, t.logprobs) for t in original
    ]
    assert rollout.reward == 1.5 and group.group_id == 7


def test_a_failed_rollout_has_no_reward_in_the_file(tmp_path):
    group = sample_group()
    group.rollouts[0].error = RolloutError(stage="score", type="RewardError", message="nan")
    write_groups(tmp_path / "r.jsonl", [group])
    assert json.loads((tmp_path / "r.jsonl").read_text())["reward"] is None
    assert read_groups(tmp_path / "r.jsonl") == [group]


def test_append_adds_and_write_replaces(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    write_groups(path, [sample_group()])
    write_groups(path, [sample_group()], append=True)
    assert len(read_groups(path)) == 2
    write_groups(path, [sample_group()])
    assert len(read_groups(path)) == 1


def test_what_json_does_not_have_is_written_as_its_nearest(tmp_path):
    import numpy

    group = sample_group()
    group.rollouts[0].info = {"array": numpy.arange(2), "scalar": numpy.float64(0.1), "set": {1}, "pair": (1, 2)}
    group.rollouts[0].task = {"path": Path("a"), (1, 2): "odd key"}
    write_groups(tmp_path / "r.jsonl", [group])
    rollout = read_groups(tmp_path / "r.jsonl")[0].rollouts[0]
    assert rollout.info == {"array": [0, 1], "scalar": 0.1, "set": [1], "pair": [1, 2]}
    assert rollout.task == {"path": "a", "(1, 2)": "odd key"}


def test_infinite_logprobs_survive(tmp_path):
    group = sample_group()
    group.rollouts[0].segments[0][2].logprobs = [-math.inf, 0.0]
    write_groups(tmp_path / "r.jsonl", [group])
    assert read_groups(tmp_path / "r.jsonl") == [group]


def test_a_file_that_was_cut_off_names_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    write_groups(path, [sample_group(), sample_group()])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"r\.jsonl:2: not a line of JSON .*the file was cut off"):
        read_groups(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken\n", r"r\.jsonl:2: not a line of JSON"),
        ("[1, 2]\n", r"r\.jsonl:2: expected a JSON object, found list"),
        ('{"a": 1}\n', r"r\.jsonl:2: this line is JSON but not a rollout"),
        ('{"nemo_rl_record": {"rollout": {}}}\n', r"r\.jsonl:2: this line is JSON but not a rollout"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    write_groups(path, [sample_group()])
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message) as caught:
        read_groups(path)
    assert "cut off" not in str(caught.value)


def test_a_missing_or_binary_file_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: the file cannot be read \(FileNotFoundError"):
        read_groups(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UnicodeDecodeError"):
        read_groups(tmp_path / "b.jsonl")


GYM_SAMPLE = [
    {
        "responses_create_params": {"input": "What is 2+2?"},
        "response": {
            "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]}]
        },
        "reward": 1.0,
        "expected_answer": "4",
        "_ng_task_index": 5,
        "_ng_rollout_index": 1,
    },
    {
        "responses_create_params": {
            "input": [{"role": "developer", "content": "use tools"}, {"role": "user", "content": "sin 4"}]
        },
        "response": {
            "output": [
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "c1", "name": "sin", "arguments": '{"x": 4}'},
                {"type": "function_call_output", "call_id": "c1", "output": "-0.75"},
                {"type": "message", "role": "assistant", "content": "about -0.75"},
            ]
        },
        "reward": 0.5,
        "reward_components": {"correct": 0.25, "format": 0.25},
        "_ng_task_index": 5,
    },
]


def test_rows_of_gym_are_read(tmp_path):
    path = tmp_path / "gym.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GYM_SAMPLE))
    (group,) = read_groups(path)
    first, second = group.rollouts
    assert (group.group_id, first.index, first.rewards, first.response) == (5, 1, {"reward": 1.0}, "4")
    assert first.task["expected_answer"] == "4"
    assert [(m["role"], s) for m, s in zip(second.messages, [t.sampled for t in second.segments[0]], strict=True)] == [
        ("developer", False),
        ("user", False),
        ("assistant", True),
        ("assistant", True),
        ("tool", False),
        ("assistant", True),
    ]
    assert second.rewards == {"correct": 0.25, "format": 0.25}
    assert second.messages[3]["tool_calls"][0]["function"] == {"name": "sin", "arguments": '{"x": 4}'}


def gym_folder():
    override = os.environ.get("NEMO_RL_SHARED_DATA")
    places = (
        [Path(override)] if override else [parent.parent / "shared" / "data" for parent in Path(__file__).parents[2:5]]
    )
    return next((place / "gym" for place in places if (place / "gym").is_dir()), None)


@pytest.mark.skipif(gym_folder() is None, reason="no folder ../shared/data/gym (or $NEMO_RL_SHARED_DATA) here")
def test_rollouts_of_upstream_are_read_and_kept(tmp_path):
    files = sorted(gym_folder().glob("*/example_rollouts*.jsonl"))
    assert files
    for file in files:
        groups = read_groups(file)
        rewards = [json.loads(line)["reward"] for line in file.read_text().splitlines()]
        assert [g.rollouts[0].reward for g in groups] == rewards, file
        assert all(any(t.sampled for t in g.rollouts[0].segments[-1]) for g in groups), file
        write_groups(tmp_path / "r.jsonl", groups)
        assert read_groups(tmp_path / "r.jsonl") == groups, file
