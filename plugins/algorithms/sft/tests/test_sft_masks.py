"""Which tokens are trained, written out on the character tokenizer and on a small BPE."""

from __future__ import annotations

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import DataError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext
from nemo_rl_core.schema import DataConfig
from nemo_rl_plugins_sft.algorithm import SFT
from nemo_rl_plugins_sft.config import SFTConfig
from nemo_rl_plugins_sft.loss import NLLLoss

CHATML = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
FORGETFUL = (  # drops all but the last assistant turn's first word, as reasoning templates drop thoughts
    "{% for m in messages %}[{{ m['role'][0] }}]"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split()[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def char_tokenizer(template="as shipped"):
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    if template != "as shipped":
        tokenizer.chat_template = template
    return tokenizer


def make(tokenizer=None, *, max_sequence_length=64, **fields):
    context = AlgorithmContext(
        tokenizer=tokenizer or char_tokenizer(),
        resolve=lambda kind, choice: NLLLoss(),
        max_sequence_length=max_sequence_length,
    )
    return SFT(SFTConfig(**fields), context)


def shown(algorithm, rows):
    """Each row as text with its trained runs in braces."""
    batch = algorithm.build_batch(rows)
    decode = algorithm.context.tokenizer.decode
    texts = []
    for ids, mask in zip(batch.unpack("input_ids"), batch.unpack("loss_mask"), strict=True):
        text, trained = "", False
        for token, now in [*zip(ids.tolist(), mask.tolist(), strict=True), (None, False)]:
            text += "{" * (now and not trained) + "}" * (trained and not now)
            trained = now
            text += "" if token is None else decode([token])
        texts.append(text)
    return texts


def test_it_is_an_algorithm():
    algorithm = make()
    assert isinstance(algorithm, Algorithm)
    assert algorithm.feed == "examples"
    assert SFTConfig(batch_size=7).num_items_per_step == 7


def test_the_assistant_turn_with_its_end_token_is_trained():
    assert shown(make(), [chat("1+1", "2")]) == ["<|user|>1+1<|end|><|assistant|>{2<|end|>}"]


def test_every_assistant_turn_of_a_conversation():
    row = chat("a", "b", "c", "d", system="s")
    both = "<|system|>s<|end|><|user|>a<|end|><|assistant|>{b<|end|>}<|user|>c<|end|><|assistant|>{d<|end|>}"
    assert shown(make(), [row]) == [both]
    assert shown(make(train_on="last_assistant"), [row]) == [both.replace("{b<|end|>}", "b<|end|>")]


def test_a_user_turn_at_the_end_is_not_trained():
    assert shown(make(), [chat("a", "b", "c")]) == ["<|user|>a<|end|><|assistant|>{b<|end|>}<|user|>c<|end|>"]


def test_all_trains_everything_but_the_first_token():
    assert shown(make(train_on="all"), [chat("a", "b")]) == ["<|user|>{a<|end|><|assistant|>b<|end|>}"]


def test_prompt_and_response_columns():
    assert shown(make(), [{"prompt": "1+1", "response": "2"}]) == ["<|user|>1+1<|end|><|assistant|>{2<|end|>}"]


def test_what_a_template_writes_after_the_end_token_is_not_trained():
    tokenizer = char_tokenizer(CHATML)
    assert shown(make(tokenizer), [chat("a", "b", "c", "d")]) == [
        "[u]a<|end|>\n[a]{b<|end|>}\n[u]c<|end|>\n[a]{d<|end|>}\n"
    ]


def test_an_answer_that_is_empty_still_learns_to_end():
    assert shown(make(), [chat("a", "")]) == ["<|user|>a<|end|><|assistant|>{<|end|>}"]


def test_template_arguments_reach_the_template():
    tokenizer = char_tokenizer("{{ mark }}" + CHATML)
    config = DataConfig(chat_template_kwargs={"mark": "X"})
    assert shown(make(tokenizer, data=config), [chat("a", "b")]) == ["X[u]a<|end|>\n[a]{b<|end|>}\n"]


def test_without_a_template_the_contents_are_joined():
    tokenizer = char_tokenizer(None)
    assert shown(make(tokenizer), [chat("1+1=", "2")]) == ["1+1={2<|end|>}"]
    assert shown(make(tokenizer), [chat("a", "b", "c", "d")]) == ["a{b<|end|>}c{d<|end|>}"]
    assert shown(make(tokenizer, train_on="last_assistant"), [chat("a", "b", "c", "d")]) == ["ab<|end|>c{d<|end|>}"]


def test_a_template_that_rewrites_history_is_refused_unless_only_the_last_turn_is_trained():
    tokenizer = char_tokenizer(FORGETFUL)
    with pytest.raises(DataError, match=r"message 1 .*last_assistant"):
        make(tokenizer).build_batch([chat("a", "x y", "c", "d")])
    assert shown(make(tokenizer, train_on="last_assistant"), [chat("a", "x y", "c", "d")]) == [
        "[u]a<|end|>[a]y<|end|>[u]c<|end|>[a]{d<|end|>}"
    ]


def test_a_conversation_that_nothing_prompts_is_refused():
    row = {"messages": [{"role": "assistant", "content": "hi"}]}
    with pytest.raises(DataError, match="nothing prompts it"):
        make().build_batch([row])
    assert shown(make(train_on="all"), [row]) == ["<|assistant|>{hi<|end|>}"]


def test_a_template_that_refuses_says_which_roles():
    tokenizer = char_tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match=r"\['user', 'assistant'\].*no system"):
        make(tokenizer).build_batch([chat("a", "b")])


@pytest.mark.parametrize("row", [{"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}])
def test_a_row_that_teaches_nothing_is_refused(row):
    with pytest.raises(DataError):
        make().build_batch([row])


# -- long rows and counts ------------------------------------------------------------------------------------


def test_a_long_row_loses_its_end_and_is_counted():
    algorithm = make(max_sequence_length=6)  # <|user|> a <|end|> <|assistant|> then two of the answer
    rows = [chat("a", "bcdef"), chat("a", "b"), chat("abcdefgh", "b")]
    assert shown(algorithm, rows) == [
        "<|user|>a<|end|><|assistant|>{bc}",
        "<|user|>a<|end|><|assistant|>{b<|end|>}",
        "<|user|>abcde",
    ]
    metrics = algorithm.finish_batch(algorithm.build_batch(rows))
    assert metrics["truncated_fraction"] == approx(2 / 3)
    assert metrics["untrained_fraction"] == approx(1 / 3)
    assert metrics["trained_tokens"] == 4
    assert metrics["mean_length"] == 6


def test_rows_do_not_depend_on_their_batch_nor_on_the_epoch():
    algorithm = make()
    rows = [chat("a", "b"), chat("ccc", "dd", "e", "f"), chat("a", "b")]
    first = algorithm.build_batch(rows)
    again = algorithm.build_batch(rows[::-1])
    alone = make().build_batch([rows[1]])
    for name in ("input_ids", "loss_mask"):
        assert torch.equal(first.select([2, 1, 0])[name], again[name])
        assert torch.equal(first.select([1])[name], alone[name])
    assert first.lengths.tolist() == [6, 15, 6]


# -- a tokenizer that merges over borders ------------------------------------------------------------------------


def bpe_tokenizer(template, *, trim_offsets):
    """Byte-level BPE in which " 4" is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab[space + "4"] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[(space, "4")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


SPACED = (  # the generation prompt ends with a space
    "{% for m in messages %}{{ 'A: ' if m['role'] == 'assistant' else 'Q: ' }}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
UNSPACED = SPACED.replace("A: ", "A:")


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_over_the_border_is_cut_as_it_is_when_sampling(trim_offsets):
    tokenizer = bpe_tokenizer(SPACED, trim_offsets=trim_offsets)
    algorithm = make(tokenizer)
    prompt = tokenizer.apply_chat_template(
        chat("2+2")["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    batch = algorithm.build_batch([chat("2+2", "4")])
    assert batch["input_ids"][: len(prompt)].tolist() == prompt
    assert batch["loss_mask"].tolist() == [False] * len(prompt) + [True, True]
    assert shown(algorithm, [chat("2+2", "4")]) == ["Q: 2+2<|end|>A: {4<|end|>}"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_inside_the_answer_stays_whole(trim_offsets):
    tokenizer = bpe_tokenizer(UNSPACED, trim_offsets=trim_offsets)
    batch = make(tokenizer).build_batch([chat("2+2", " 4")])
    assert batch["loss_mask"].sum() == 2
    assert batch["input_ids"][-2].item() == tokenizer.convert_tokens_to_ids("\u01204")
    assert shown(make(tokenizer), [chat("x 4", " 4 4", " 4", "y")]) == [
        "Q: x 4<|end|>A:{ 4 4<|end|>}Q:  4<|end|>A:{y<|end|>}"
    ]


@pytest.mark.parametrize("template", [None, "<|end|>" + UNSPACED])
def test_what_the_tokenizer_puts_in_front_stands_there_once(template):
    """Without a template the tokenizer adds it, as for a prompt; with one, the template wrote it."""
    from tokenizers import processors

    tokenizer = bpe_tokenizer(template, trim_offsets=False)
    start = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", start)]
    )
    ids = make(tokenizer).build_batch([chat("ab", "c")])["input_ids"].tolist()
    assert ids[0] == start
    assert ids[1] != start
    assert ids.count(start) == (2 if template is None else 3)


def test_characters_of_several_tokens():
    tokenizer = bpe_tokenizer(UNSPACED, trim_offsets=False)
    batch = make(tokenizer).build_batch([chat("é", "ü")])
    assert batch["loss_mask"].sum() == 3  # two bytes and the end


def test_a_row_without_any_token_is_refused():
    with pytest.raises(DataError, match="no token at all"):
        make(char_tokenizer("{{ '' }}"), train_on="all").build_batch([chat("a", "b")])
