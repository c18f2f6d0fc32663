from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.data.encode import Encoded, Encoder
from peftctl.data.fitting import OnLong
from peftctl.data.formats import Chat, Pair, Parsed, Text
from peftctl.errors import DataError

Of = Callable[[str], Any]
FAMILIES = ["chatml", "qwen3", "qwen3-thinking", "llama2", "llama3", "gemma", "phi3", "harmony"]

USER = {"role": "user", "content": " What is it? "}
ANSWER = {"role": "assistant", "content": "  It is what it is.\n"}
WHY = {"role": "user", "content": "Why?"}
BECAUSE = {"role": "assistant", "content": "😀 Because."}
CHAT = Chat("rows.jsonl:1", [USER, ANSWER, WHY, BECAUSE])

# Exactly what is trained of CHAT, turn by turn.
TRAINED = {
    "chatml": ["  It is what it is.\n<|im_end|>", "😀 Because.<|im_end|>"],
    "qwen3": ["  It is what it is.\n<|im_end|>", "<think>\n\n</think>\n\n😀 Because.<|im_end|>"],
    "qwen3-thinking": ["  It is what it is.\n<|im_end|>", "\n</think>\n\n😀 Because.<|im_end|>"],
    "llama2": ["It is what it is. </s>", "😀 Because. </s>"],
    "llama3": ["It is what it is.<|eot_id|>", "😀 Because.<|eot_id|>"],
    "gemma": ["It is what it is.<end_of_turn>", "😀 Because.<end_of_turn>"],
    "phi3": ["  It is what it is.\n<|end|>", "😀 Because.<|end|>"],
    "harmony": [
        "<|channel|>final<|message|>  It is what it is.\n<|end|>",
        "<|channel|>final<|message|>😀 Because.<|return|>",
    ],
}


def encoder(tokenizer: Any, length: int = 2048, on_long: OnLong = "truncate") -> Encoder:
    return Encoder(tokenizer, tokenizer.chat_template, length, on_long)


def encode(tokenizer: Any, row: Parsed) -> Encoded:
    return encoder(tokenizer).whole(row)


def own(tokenizer: Any, messages: list[Any]) -> list[int]:
    """The tokenizer's own ids; where a text spells a special token, those of transformers' own way with that."""
    ids: list[int] = tokenizer.apply_chat_template(messages)["input_ids"]
    if any(token in message["content"] for token in tokenizer.get_added_vocab() for message in messages):
        ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    return ids


def trained(tokenizer: Any, row: Encoded) -> list[str]:
    return [tokenizer.decode(row.ids[start:end], clean_up_tokenization_spaces=False) for start, end in row.spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_with_their_stop_token_are_trained_and_nothing_else(family: str, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    row = encode(tokenizer, CHAT)
    assert row.input_ids == own(tokenizer, CHAT.messages)
    assert trained(tokenizer, row) == TRAINED[family]
    inside = {i for start, end in row.spans for i in range(start, end)}
    assert row.labels == [id if i in inside else -100 for i, id in enumerate(row.ids)]
    assert row.trained == len(inside)
    assert not row.truncated
    assert len(row) == len(row.input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_untrained_is_the_prompt(family: str, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, BECAUSE]))
    prompt = tokenizer.apply_chat_template([WHY], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row.input_ids[: row.spans[0][0]]).replace("<s> ", "<s>") == prompt


@pytest.mark.parametrize("messages", [[WHY, BECAUSE], [USER, ANSWER, WHY, BECAUSE], [BECAUSE, WHY, ANSWER]])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_the_real_smollm2(smollm2: Any, messages: list[Any], system: list[Any]) -> None:
    messages = system + messages
    row = encode(smollm2, Chat("rows.jsonl:1", messages))
    assert row.input_ids == own(smollm2, messages)
    # The line break that ends the header and the first of two spaces are one token, which is not trained.
    assert "Ċ Ġ".replace(" ", "") in smollm2.get_vocab()
    answers = [
        message["content"].removeprefix(" ") + "<|im_end|>" for message in messages if message["role"] == "assistant"
    ]
    assert trained(smollm2, row) == answers
    assert ("named SmolLM" in smollm2.decode(row.ids)) == (not system)


def test_stop_tokens_are_gathered(tokenizer_of: Of) -> None:
    for family, stops in {"chatml": ["<|im_end|>"], "harmony": ["<|end|>", "<|return|>"], "llama2": ["</s>"]}.items():
        tokenizer = tokenizer_of(family)
        encodes = encoder(tokenizer)
        encodes.encode(CHAT)
        assert encodes.stop_ids == set(tokenizer.convert_tokens_to_ids(stops))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_answer_is_trained_only_where_it_is_one(family: str, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    messages = [{"role": role, "content": "model"} for role in ("user", "assistant", "user", "assistant")]
    row = encode(tokenizer, Chat("rows.jsonl:1", messages))
    assert [text.count("model") for text in trained(tokenizer, row)] == [1, 1]
    assert row.spans[0][0] > row.ids.index(tokenizer("model", add_special_tokens=False)["input_ids"][-1])


def test_only_turns_of_the_completion_are_trained(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    row = encode(tokenizer, Chat("rows.jsonl:1", CHAT.messages, first=2))
    assert row.input_ids == own(tokenizer, CHAT.messages)
    assert trained(tokenizer, row) == ["😀 Because.<|im_end|>"]


def test_a_stop_token_inside_the_answer_does_not_end_it(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    answer = "say <|im_end|> and\n<|im_start|>user\nmore"
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, {"role": "assistant", "content": answer}]))
    assert trained(tokenizer, row) == [answer + "<|im_end|>"]
    assert [row.ids.count(id) for id in tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])] == [2, 2]


def test_thinking_is_trained_where_the_template_keeps_it(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, thought, WHY, thought]))
    assert row.input_ids == own(tokenizer, [WHY, thought, WHY, thought])
    assert trained(tokenizer, row) == ["Yes.<|im_end|>", "<think>\nhm\n</think>\n\nYes.<|im_end|>"]


@pytest.mark.parametrize("trim", [True, False])
def test_a_special_token_that_swallows_space_stays_in_the_header(
    trim: bool, make_tokenizer: Callable[..., Any]
) -> None:
    from tokenizers import AddedToken

    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    tokens = [
        AddedToken(f"<|{name}|>", rstrip=True, lstrip=True, special=True) for name in ("user", "assistant", "end")
    ]
    tokenizer = make_tokenizer(template, tokens, trim_offsets=trim, eos_token="<|end|>")
    row = encode(tokenizer, Chat("rows.jsonl:1", [USER, {"role": "assistant", "content": "\n It is. "}]))
    assert trained(tokenizer, row) == ["It is.<|end|>"]


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_across_the_end_of_the_header_is_the_headers(trim: bool, make_tokenizer: Callable[..., Any]) -> None:
    tokens = ["<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(HEADED + PROMPT, tokens, trim_offsets=trim, eos_token="<|im_end|>")
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, {"role": "assistant", "content": "\n\nYes."}]))
    assert tokenizer.decode(row.input_ids[: row.spans[0][0]]).endswith("assistant\n\n")
    assert trained(tokenizer, row) == ["\nYes.<|im_end|>"]


def test_an_answer_that_begins_as_the_generation_prompt_goes_on(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("qwen3-thinking")
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, {"role": "assistant", "content": "<tea>"}, WHY, BECAUSE]))
    assert trained(tokenizer, row)[0] == "<tea><|im_end|>"


def test_two_answers_in_a_row(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, ANSWER, BECAUSE]))
    assert trained(tokenizer, row) == TRAINED["chatml"]


def test_a_word_that_is_unknown_is_no_stop_token(make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "ask", "why", "yes", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ~ ' + eos_token }}{% endfor %}"
    row = encode(tokenizer, Chat("rows.jsonl:1", [WHY, {"role": "assistant", "content": "strange yes"}]))
    assert [tokenizer.convert_ids_to_tokens(row.input_ids[a:b]) for a, b in row.spans] == [
        ["<unk>", "yes", "<unk>", "</s>"]
    ]


def test_one_token_for_begin_end_pad_and_unknown(make_tokenizer: Callable[..., Any]) -> None:
    one = "<|endoftext|>"
    template = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = make_tokenizer(template, [one], bos_token=one, eos_token=one, pad_token=one, unk_token=one)
    row = encode(tokenizer, CHAT)
    assert trained(tokenizer, row) == ["   It is what it is.\n<|endoftext|>", " 😀 Because.<|endoftext|>"]
    assert encode(tokenizer, Text("rows.jsonl:1", "a b")).labels[-1] == tokenizer.eos_token_id


NO_STOP = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HEADED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (NO_STOP + PROMPT, "rows.jsonl:1: the stop token is never trained"),
        # Only the last answer is closed: after the first, the next header must not pass for a stop token.
        (
            NO_STOP + "{% if not add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}" + PROMPT,
            "the stop token is never",
        ),
        # Users' turns are closed, the assistant's are not.
        (
            HEADED.replace("+ '<|im_end|>", "+ ('<|im_end|>' if m.role == 'user' else '') + '") + PROMPT,
            "the stop token is",
        ),
        # Nothing marks where turns end but the end of the whole.
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
            "{{ 'assistant:' if add_generation_prompt else eos_token }}",
            "the stop token is never trained",
        ),
        # What follows the first answer is the beginning of the next question.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content + ' [/INST]' }}{% else %}"
            "{{ ' ' + m.content }}{{ eos_token if loop.last else '' }}{% endif %}{% endfor %}",
            "the stop token is never trained",
        ),
        (HEADED.replace("+ m['content']", "+ m['content'] | length | string + m['content']") + PROMPT, "is in doubt"),
        (HEADED.replace("<|im_end|>", "<|end|>") + PROMPT, "the stop token is never trained; no special token ends"),
        (HEADED, "writes other text before this answer than when it asks for one"),
        (HEADED.replace("'<|im_start|>' + m['role']", "m['role'] + ':'"), "writes other text before this answer"),
        (HEADED + PROMPT.replace("assistant", "bot"), "writes other text before this answer than when it asks"),
        # The system prompt goes to the last user turn, so to none once there is an answer, as in some of Mistral's.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + ('Be brief. ' if loop.last else '') }}"
            "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
            "writes other text before this answer than when it asks for one",
        ),
        # The same with a header: other turns than the assistant's may not change once more follow.
        (
            "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
            + HEADED.replace("m['content']", "('Be brief. ' if m == asked[-1] else '') + m['content']")
            + PROMPT,
            "writes other text before this answer than when it asks for one",
        ),
        (HEADED.replace("m['content']", "m['content'] | upper") + PROMPT, ""),
        (HEADED.replace("m['content']", "m['content'] * 2") + PROMPT, "changes, repeats or leaves out this answer"),
        (HEADED.replace("m['content']", "m['content'][:3]") + PROMPT, "changes, repeats or leaves out this answer"),
    ],
)
def test_a_template_that_leaves_the_answer_in_doubt_is_refused(
    template: str, what: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(template, tokens, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    if not what:  # a mark comes through unchanged where letters do not: there is no doubt about the place
        assert trained(tokenizer, encode(tokenizer, CHAT))[1] == "😀 BECAUSE.<|im_end|>"
        return
    with pytest.raises(DataError) as caught:
        encoder(tokenizer).encode(CHAT)
    assert what in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:1: ")
    assert "choose another `dataset.chat_template`" in str(caught.value)


PIECES = [
    "",
    " ",
    "\n",
    "\n\n",
    "a",
    "model",
    "user",
    "é",
    "😀",
    "\u200d",
    "<|im_end|>",
    "</s>",
    "[/INST]",
    "\ue000",
    "\t",
    ".",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_texts(contents: list[str], data: st.DataObject, tokenizer_of: Of) -> None:
    """Whatever is said, ids are the tokenizer's own, and each turn is trained once, through its own stop token."""
    family = data.draw(st.sampled_from(FAMILIES))
    tokenizer = tokenizer_of(family)
    messages = [{"role": role, "content": text + "?!"} for text in contents for role in ("user", "assistant")]
    row = encode(tokenizer, Chat("rows.jsonl:1", messages))
    assert row.input_ids == own(tokenizer, messages)
    assert len(row.spans) == len(contents)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for (_, end), text in zip(row.spans, contents, strict=True):
        assert row.ids[end - 1] in special
        assert trained(tokenizer, row)[contents.index(text)].count("?!") == 1
    if family == "chatml":  # which writes answers as they are
        answers = [text + "?!<|im_end|>" for text in contents]
        assert [text.lstrip() for text in trained(tokenizer, row)] == [text.lstrip() for text in answers]
    gaps = zip([0, *(end for _, end in row.spans)], [start for start, _ in row.spans], strict=False)
    assert [tokenizer.decode(row.ids[start:end]).count("?!") for start, end in gaps] == [1] * len(contents)


def test_prompt_and_completion(tokenizer_of: Of) -> None:
    for family, bos in {"chatml": [], "llama2": [1]}.items():
        tokenizer = tokenizer_of(family)
        row = encode(tokenizer, Pair("rows.jsonl:1", "Question: why?\nAnswer:", " It is. It is."))
        assert row.input_ids == tokenizer("Question: why?\nAnswer: It is. It is.")["input_ids"] + [
            tokenizer.eos_token_id
        ]
        assert row.input_ids[: len(bos)] == bos
        assert trained(tokenizer, row)[0].strip() == "It is. It is." + tokenizer.eos_token
        assert tokenizer.decode(row.ids[len(bos) : row.spans[0][0]]) == "Question: why?\nAnswer:"
        first = encode(tokenizer, Pair("rows.jsonl:1", "", "It is."))
        assert trained(tokenizer, first)[0].endswith("is." + tokenizer.eos_token)


def test_plain_text_is_trained_but_for_its_first_token(tokenizer_of: Of) -> None:
    for family in ("chatml", "llama2"):
        tokenizer = tokenizer_of(family)
        row = encode(tokenizer, Text("rows.jsonl:1", "The lazy dog."))
        assert row.input_ids == tokenizer("The lazy dog.")["input_ids"] + [tokenizer.eos_token_id]
        assert row.spans == ((1, len(row)),)
        assert row.labels == [-100, *row.ids[1:]]


def test_the_end_token_comes_once(tokenizer_of: Of) -> None:
    from tokenizers import processors

    tokenizer = deepcopy(tokenizer_of("chatml"))  # which other tests share
    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <|im_end|>", special_tokens=[end])
    assert encode(tokenizer, Text("rows.jsonl:1", "a")).input_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "row", [CHAT, Pair("rows.jsonl:1", "Why? " * 9, "Because " * 40), Text("rows.jsonl:1", "a b " * 99)]
)
def test_long_rows(row: Parsed, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    whole = encode(tokenizer, row)
    length = len(whole) - 3
    (cut,) = encoder(tokenizer, length).encode(row)
    assert cut.truncated
    assert cut.cut == 3
    assert cut.input_ids == whole.input_ids[:length]
    assert cut.labels == whole.labels[:length]
    assert encoder(tokenizer, length, "drop").encode(row) == []
    with pytest.raises(DataError, match=rf"^rows.jsonl:1: {len(whole)} tokens, more than `max_length` {length}"):
        encoder(tokenizer, length, "error").encode(row)
    assert encoder(tokenizer, len(whole), "error").encode(row) == [whole]


def test_a_row_that_trains_nothing_is_an_error(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    start = encode(tokenizer, CHAT).spans[0][0]
    with pytest.raises(DataError, match=rf"^rows.jsonl:1: nothing to train is left in the first {start} tokens; raise"):
        encoder(tokenizer, start).encode(CHAT)
    (one,) = encoder(tokenizer, start + 1).encode(CHAT)
    assert one.trained == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: trains nothing"):
        encode(tokenizer, Chat("rows.jsonl:1", CHAT.messages, first=4))


def test_tokenizers_that_cannot_do_it(tokenizer_of: Of, make_tokenizer: Callable[..., Any]) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="the tokenizer is a slow one"):
        Encoder(ByT5Tokenizer(), None, 9, "truncate")
    endless = make_tokenizer("{{ 'x' }}", ["<s>"], bos_token="<s>")
    with pytest.raises(DataError, match="has no end token"):
        Encoder(endless, None, 9, "truncate")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the tokenizer has no end token"):
        encode(endless, Text("rows.jsonl:1", "a"))
