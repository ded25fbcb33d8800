"""Rows to tasks and examples: mapping, templates, chat rows, NeMo Gym rows, and errors with the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl_core.data.prompts import RowFormat, gym_messages, sft_messages
from nemo_rl_core.errors import DataError
from nemo_rl_core.schema import DatasetConfig

USER = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_columns_are_renamed_and_the_rest_is_kept():
    form = RowFormat(columns={"prompt": "question", "answer": "solution"})
    row = {"question": "q", "solution": "s", "level": 3}
    assert form.task(row) == {"question": "q", "solution": "s", "level": 3, "prompt": "q", "answer": "s"}
    assert set(row) == {"question", "solution", "level"}


def test_template_reads_columns_by_either_name_and_formats():
    form = RowFormat(columns={"answer": "target"}, prompt_template="{numbers[0]:>3} of {answer}: {{x}}")
    assert form.task({"numbers": [7], "target": 24})["prompt"] == "  7 of 24: {x}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {hint}", r"'hint', which row 5 of d\.jsonl does not have\. It has: 'question'"),
        ("{question", r"cannot be filled.*literal brace"),
        ("{}", r"cannot be filled|''"),
        ("{question.nope}", "cannot be filled"),
    ],
)
def test_template_errors(template, message):
    with pytest.raises(DataError, match=message):
        RowFormat(prompt_template=template, source="d.jsonl").task({"question": "q"}, where="row 5")


def test_a_missing_column_names_what_there_is():
    with pytest.raises(
        DataError, match=r"Row 5 of d\.jsonl has no column 'qestion' \(for prompt\)\. It has: 'question'"
    ):
        RowFormat(columns={"prompt": "qestion"}, source="d.jsonl").task({"question": "q"}, where="row 5")


def test_the_prompt_column_is_text_or_messages():
    assert RowFormat().task({"prompt": [USER]})["prompt"] == [USER]
    for bad in (3, None, [{"text": "no role"}], ["plain"]):
        with pytest.raises(DataError, match="'prompt'"):
            RowFormat().task({"prompt": bad})


def test_a_question_is_guessed_only_if_there_is_one():
    assert RowFormat().task({"problem": "p", "expected_answer": 1})["prompt"] == "p"
    with pytest.raises(DataError, match=r"'problem', 'question' could each be it.*columns: \{prompt: problem\}"):
        RowFormat().task({"problem": "p", "question": "q"})
    with pytest.raises(DataError, match=r"no column 'prompt'\. It has: 'text'"):
        RowFormat().task({"text": "t"})


def test_chat_rows_lose_their_last_reply_to_answer():
    assert RowFormat().task({"messages": [USER, REPLY]}) == {"prompt": [USER], "answer": "4"}
    kept = RowFormat().task({"messages": [USER, REPLY], "answer": "four"})
    assert kept["answer"] == "four"
    assert RowFormat().task({"messages": [USER, REPLY, USER]}) == {"prompt": [USER, REPLY, USER]}


def test_empty_fields_of_a_table_are_not_passed_to_the_template():
    wide = {**USER, "tool_calls": None, "name": None}
    assert RowFormat().task({"messages": [wide]})["prompt"] == [USER]
    assert RowFormat().task({"prompt": [{"role": "assistant", "content": None}]})["prompt"][0]["content"] == ""


def test_system_prompt():
    form = RowFormat(system_prompt="Be brief.")
    assert form.task({"prompt": "2 + 2?"})["prompt"] == [SYSTEM, USER]
    assert form.task({"messages": [{"role": "system", "content": "old"}, USER]})["prompt"] == [SYSTEM, USER]
    assert form.example({"messages": [USER, REPLY]})["messages"] == [SYSTEM, USER, REPLY]
    assert sft_messages(form.example({"prompt": "2 + 2?", "response": "4"})) == [SYSTEM, USER, REPLY]


def test_from_config_carries_every_setting():
    config = DatasetConfig(columns={"prompt": "q"}, prompt_template="{q}!", system_prompt="s")
    form = RowFormat.from_config(config, source="here")
    assert (form.columns, form.prompt_template, form.system_prompt, form.source) == (
        {"prompt": "q"},
        "{q}!",
        "s",
        "here",
    )


# -- supervised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": "2 + 2?", "answer": "4"},
    ],
)
def test_supervised_shapes(row):
    assert sft_messages(row) == [USER, REPLY]


def test_supervised_columns_and_template():
    form = RowFormat(columns={"response": "solution"}, prompt_template="{a} + {b}?")
    assert sft_messages(form.example({"a": 2, "b": 2, "solution": "4"})) == [USER, REPLY]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, r"Row 3 .*neither a chat.*'text'.*columns: \{prompt"),
        ({"prompt": "p"}, "neither a chat"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": "hello"}, "is a str; expected a list of messages"),
    ],
)
def test_supervised_errors(row, message):
    with pytest.raises(DataError, match=message):
        sft_messages(row, where="row 3")


# -- NeMo Gym rows ---------------------------------------------------------------------------------------------


def test_gym_input_as_text_and_as_items():
    assert gym_messages({"input": "2 + 2?"}) == [USER]
    assert gym_messages({"input": [{**USER, "type": "message"}], "instructions": "Be brief."}) == [SYSTEM, USER]
    parts = {"role": "developer", "content": [{"type": "input_text", "text": "Be "}, {"text": "brief."}]}
    assert gym_messages({"input": [parts]}) == [SYSTEM]


def test_gym_calls_become_tool_messages():
    items = [
        USER,
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call", "call_id": "c2", "name": "sub", "arguments": "not json"},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
    ]
    user, assistant, tool = gym_messages({"input": items})
    assert user == USER
    assert [c["function"] for c in assistant["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 2}},
        {"name": "sub", "arguments": "not json"},
    ]
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "4"}


def test_gym_errors():
    with pytest.raises(DataError, match="without `input`"):
        RowFormat().task({"responses_create_params": {}})
    with pytest.raises(DataError, match="kind 'image'"):
        gym_messages({"input": [{"type": "image"}]})


def test_gym_rows_keep_their_other_fields():
    task = RowFormat().task({"responses_create_params": {"input": [USER]}, "expected_answer": "4"})
    assert task["prompt"] == [USER] and task["expected_answer"] == "4" and "responses_create_params" in task
    both = {"responses_create_params": {"input": [USER]}, "prompt": "raw", "text": "mapped"}
    assert RowFormat().task(both)["prompt"] == [USER]
    assert RowFormat(columns={"prompt": "text"}).task(both)["prompt"] == "mapped"
    assert RowFormat().task({**both, "responses_create_params": {"input": []}})["prompt"] == "raw"


def test_every_recorded_gym_example_becomes_a_task():
    above = [parent / "shared" / "data" / "gym" for parent in Path(__file__).resolve().parents]
    folder = next((f for f in above if f.is_dir()), None)
    if folder is None:
        pytest.skip("recorded NeMo Gym examples (shared/data/gym) are not above this checkout")
    for path in sorted(folder.glob("*/example.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            prompt = RowFormat(source=str(path)).task(row)["prompt"]
            assert all("role" in m for m in prompt)
            assert bool(prompt) == bool(row["responses_create_params"]["input"])
