from __future__ import annotations

import pytest

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError
from nemo_rl_core.models import load_tokenizer

# Strips the thoughts of all but the newest assistant messages, as reasoning models' templates do.
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def tokenizer():
    return load_tokenizer("scratch:qwen2-tiny")


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_initial_is_the_templates_prompt(tokenizer):
    assert ChatFormatter(tokenizer).initial([user("2+2")]) == ids(tokenizer, "<|user|>2+2<|end|><|assistant|>")


def test_initial_gives_a_fresh_list_each_time(tokenizer):
    chat = ChatFormatter(tokenizer)
    chat.initial([user("2")]).append(99)
    assert 99 not in chat.initial([user("2")])


def test_without_a_template_contents_are_joined_as_they_are(tokenizer):
    tokenizer.chat_template = None
    chat = ChatFormatter(tokenizer)
    assert chat.initial([user("2+"), user("2=")]) == ids(tokenizer, "2+2=")
    extension = chat.extend([user("2+2="), assistant("4")], ids(tokenizer, "2+2=4"), [user(" 3+3=")])
    assert extension.token_ids == ids(tokenizer, " 3+3=") and not extension.forked


def test_chat_template_kwargs_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}"
    assert ChatFormatter(tokenizer, chat_template_kwargs={"shout": True}).initial([user("a")]) == ids(tokenizer, "a!")


def test_other_fields_of_messages_reach_the_template_and_the_cache(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['name'] }}"
    chat = ChatFormatter(tokenizer)
    one = chat.initial([{"role": "user", "content": "x", "name": "a"}])
    two = chat.initial([{"role": "user", "content": "x", "name": "b"}])
    assert (one, two) == (ids(tokenizer, "a"), ids(tokenizer, "b"))


@pytest.mark.parametrize("ended", [True, False], ids=["end token sampled", "stop string"])
def test_extension_closes_the_turn_once(tokenizer, ended):
    chat = ChatFormatter(tokenizer)
    before = [user("2+2"), assistant("4")]
    sampled = ids(tokenizer, "4<|end|>" if ended else "4")
    so_far = chat.initial(before[:1]) + sampled
    extension = chat.extend(before, so_far, [user("3")])
    assert not extension.forked
    assert so_far + extension.token_ids == chat.initial([*before, user("3")])


def test_sampled_tokens_are_kept_even_if_text_would_tokenise_differently(tokenizer):
    chat = ChatFormatter(tokenizer)
    odd = [*ids(tokenizer, "4"), 6, 1]  # an unknown token that decodes to nothing
    so_far = chat.initial([user("2+2")]) + odd
    extension = chat.extend([user("2+2"), assistant("4")], so_far, [user("3")])
    assert extension.token_ids == ids(tokenizer, "<|user|>3<|end|><|assistant|>")


def test_an_empty_answer_is_continued(tokenizer):
    chat = ChatFormatter(tokenizer)
    so_far = [*chat.initial([user("2")]), 1]
    extension = chat.extend([user("2"), assistant("")], so_far, [user("3")])
    assert so_far + extension.token_ids == chat.initial([user("2"), assistant(""), user("3")])


def test_white_space_that_a_template_strips_is_no_fork(tokenizer):
    tokenizer.chat_template = TRIMMING
    chat = ChatFormatter(tokenizer)
    so_far = chat.initial([user("2")]) + ids(tokenizer, " 4  <|end|>")
    extension = chat.extend([user("2"), assistant(" 4  ")], so_far, [user("3")])
    assert not extension.forked
    assert tokenizer.decode(extension.token_ids) == " <|user|>3<|end|> <|assistant|>"


def test_a_template_that_strips_thoughts_forks(tokenizer):
    tokenizer.chat_template = THINKING
    chat = ChatFormatter(tokenizer)
    before = [user("2"), assistant("<think>hm</think>4")]
    so_far = chat.initial(before[:1]) + ids(tokenizer, "<think>hm</think>4<|end|>")
    extension = chat.extend(before, so_far, [user("3")])
    assert extension.forked
    assert extension.token_ids == ids(tokenizer, "<|user|>2<|end|><|assistant|>4<|end|><|user|>3<|end|><|assistant|>")


def test_the_same_template_does_not_fork_on_a_tools_answer(tokenizer):
    tokenizer.chat_template = THINKING
    chat = ChatFormatter(tokenizer)
    before = [user("2"), assistant("<think>hm</think>4")]
    so_far = chat.initial(before[:1]) + ids(tokenizer, "<think>hm</think>4<|end|>")
    extension = chat.extend(before, so_far, [{"role": "tool", "content": "ok"}])
    assert not extension.forked
    assert so_far + extension.token_ids == chat.initial([*before, {"role": "tool", "content": "ok"}])


def test_a_generation_prompt_that_history_does_not_show_forks(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}(hint){% endif %}"
    )
    chat = ChatFormatter(tokenizer)
    so_far = chat.initial([user("2")]) + ids(tokenizer, "4")
    extension = chat.extend([user("2"), assistant("4")], so_far, [user("3")])
    assert extension.forked and extension.token_ids == ids(tokenizer, "[2][4][3](hint)")


def test_ten_turns_equal_the_whole_rendering(tokenizer):
    chat = ChatFormatter(tokenizer)
    messages = [user("0")]
    so_far = chat.initial(messages)
    for turn in range(10):
        messages.append(assistant(str(turn)))
        so_far += ids(tokenizer, f"{turn}<|end|>")
        new = [user("a"), user("b")]
        extension = chat.extend(messages, so_far, new)
        assert not extension.forked
        so_far += extension.token_ids
        messages += new
    assert so_far == chat.initial(messages)


def test_a_template_that_refuses_is_a_clear_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refused a conversation of roles \['user', 'user'\].*roles must alternate"):
        ChatFormatter(tokenizer).initial([user("a"), user("b")])


def test_extend_needs_a_message_of_the_policy(tokenizer):
    with pytest.raises(DataError, match="after a message of the policy"):
        ChatFormatter(tokenizer).extend([user("a")], [1], [user("b")])


def test_a_rewritten_history_of_equal_length_forks(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}:{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = ChatFormatter(tokenizer)
    so_far = chat.initial([user("a")]) + ids(tokenizer, "4")
    extension = chat.extend([user("a"), assistant("4")], so_far, [user("b")])
    assert extension.forked and extension.token_ids == ids(tokenizer, "3:a4b")
