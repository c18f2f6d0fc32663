"""`train_on`, per-turn flags and `system`: which tokens are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat, Pair, Text
from peftctl.errors import DataError

Of = Callable[[str], Any]

SYSTEM = {"role": "system", "content": "Be brief."}
WHAT = {"role": "user", "content": "What is it?"}
IS = {"role": "assistant", "content": "It is."}
WHY = {"role": "user", "content": " Why? "}
BECAUSE = {"role": "assistant", "content": "Because."}
MESSAGES = [SYSTEM, WHAT, IS, WHY, BECAUSE]


def trained(tokenizer: Any, row: Chat | Pair | Text, **how: Any) -> list[str]:
    template = tokenizer.chat_template if isinstance(row, Chat) else None
    encoded = Encoder(tokenizer, template, 2048, **how).whole(row)
    return [tokenizer.decode(encoded.ids[start:end]) for start, end in encoded.spans]


@pytest.mark.parametrize(
    ("family", "train_on", "expected"),
    [
        ("chatml", "assistant", ["It is.<|im_end|>", "Because.<|im_end|>"]),
        ("chatml", "last", ["Because.<|im_end|>"]),
        ("chatml", ["assistant"], ["It is.<|im_end|>", "Because.<|im_end|>"]),
        ("chatml", ["user"], ["What is it?<|im_end|>", " Why? <|im_end|>"]),
        ("chatml", ["system", "user"], ["Be brief.<|im_end|>", "What is it?<|im_end|>", " Why? <|im_end|>"]),
        (
            "chatml",
            ["user", "assistant"],
            ["What is it?<|im_end|>", "It is.<|im_end|>", " Why? <|im_end|>", "Because.<|im_end|>"],
        ),
        ("llama3", ["user"], ["What is it?<|eot_id|>", "Why?<|eot_id|>"]),
        # No special token closes a question in Llama 2: the words alone are trained.
        ("llama2", ["user"], ["What is it?", "Why?"]),
        ("llama2", ["user", "assistant"], ["What is it?", "It is. </s>", "Why?", "Because. </s>"]),
        ("qwen3", ["user", "assistant"], None),
        ("phi3", ["user"], ["What is it?<|end|>", " Why? <|end|>"]),
        ("harmony", ["user"], ["What is it?<|end|>", " Why? <|end|>"]),
    ],
)
def test_what_is_trained(family: str, train_on: Any, expected: list[str] | None, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    found = [text.lstrip() for text in trained(tokenizer, Chat("rows:1", MESSAGES), train_on=train_on)]
    if expected is None:  # the template's own thinking belongs to the answer
        expected = ["What is it?<|im_end|>", "It is.<|im_end|>", "Why? <|im_end|>"]
        expected.append("<think>\n\n</think>\n\nBecause.<|im_end|>")
    assert found == [text.lstrip() for text in expected]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama2", "llama3", "phi3", "harmony"])
def test_all_is_every_token_but_the_first(family: str, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, tokenizer.chat_template, 2048, train_on="all")
    row = encoder.whole(Chat("rows:1", MESSAGES))
    assert row.input_ids == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert row.spans == ((1, len(row)),)
    usual = Encoder(tokenizer, tokenizer.chat_template, 2048)
    usual.whole(Chat("rows:1", MESSAGES))
    assert encoder.stop_ids == usual.stop_ids  # what generation stops at does not depend on it


def test_all_trains_prompts_too(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("llama2")
    assert trained(tokenizer, Pair("rows:1", "Why?", " Because."), train_on="all") == ["Why? Because.</s>"]
    assert trained(tokenizer, Pair("rows:1", "Why?", " Because."), train_on="last") == ["Because.</s>"]
    assert trained(tokenizer, Pair("rows:1", "Why?", " Because."), train_on=["user"]) == ["Because.</s>"]
    chat = tokenizer_of("chatml")
    row = Encoder(chat, chat.chat_template, 99, train_on="all").whole(Chat("rows:1", MESSAGES, first=3))
    assert row.spans == ((1, len(row)),)


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("assistant", (True, True, False, True, True), ["Because.<|im_end|>"]),
        ("assistant", (False, False, True, False, False), ["It is.<|im_end|>"]),
        ("last", (True, True, False, True, True), ["Because.<|im_end|>"]),
        (["user", "assistant"], (True, False, True, True, False), ["It is.<|im_end|>", "Why? <|im_end|>"]),
        ("all", (True,) * 5, ["{rest}"]),
        (
            "all",
            (True, True, False, True, True),
            [
                "system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
                "\n<|im_start|>user\n Why? <|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n",
            ],
        ),
    ],
)
def test_a_turn_that_is_flagged_is_never_trained(
    train_on: Any, flags: tuple[bool, ...], expected: list[str], tokenizer_of: Of
) -> None:
    tokenizer = tokenizer_of("chatml")
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False).removeprefix("<|im_start|>")
    found = trained(tokenizer, Chat("rows:1", MESSAGES, flags=flags), train_on=train_on)
    assert found == [text.format(rest=whole) for text in expected]


@pytest.mark.parametrize("train_on", ["assistant", "last", ["user"], ["tool"]])
def test_a_conversation_that_trains_nothing_is_an_error(train_on: Any, tokenizer_of: Of) -> None:
    with pytest.raises(DataError, match=r"^rows:1: trains nothing"):
        trained(tokenizer_of("chatml"), Chat("rows:1", MESSAGES, flags=(False,) * 5), train_on=train_on)


def test_user_turns_without_a_closing_token_do_not_borrow_the_next_ones(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ '<|end|>' if m.role == 'assistant' }}"
    template += "{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    tokenizer = make_tokenizer(template, ["<|user|>", "<|assistant|>", "<|end|>"], eos_token="<|end|>")
    row = Chat("rows:1", [WHAT, WHAT, IS, WHAT, BECAUSE])
    assert trained(tokenizer, row, train_on=["user"]) == ["What is it?"] * 3


@pytest.mark.parametrize("family", ["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("flags", [None, (True, False, True, True)])
def test_a_system_message_for_conversations_without_one(family: str, flags: Any, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, tokenizer.chat_template, 2048, system="Be brief.")
    with_one = Encoder(tokenizer, tokenizer.chat_template, 2048).whole(
        Chat("rows:1", MESSAGES, first=3, flags=flags and (True, *flags))
    )
    assert encoder.whole(Chat("rows:1", MESSAGES[1:], first=2, flags=flags)) == with_one
    assert encoder.whole(Chat("rows:1", MESSAGES, first=3, flags=flags and (True, *flags))) == with_one
    assert encoder.chat_prompt(MESSAGES[1:2]) == encoder.chat_prompt(MESSAGES[:2])
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True)["input_ids"]
    assert encoder.chat_prompt(MESSAGES[:2]) == prompt


def test_a_system_message_is_not_trained_for_being_added(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    assert trained(tokenizer, Chat("rows:1", [WHY, BECAUSE]), system="Be brief.") == ["Because.<|im_end|>"]


def test_an_answer_that_is_closed_before_its_turn_is_trained_to_the_end(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|said|><|end|>' }}{% endfor %}"
    template += "{{ '<|assistant|>' if add_generation_prompt }}"
    tokens = ["<|user|>", "<|assistant|>", "<|said|>", "<|end|>"]
    tokenizer = make_tokenizer(template, tokens, eos_token="<|end|>")
    found = trained(tokenizer, Chat("rows:1", [WHAT, IS, WHAT, BECAUSE]))
    assert found == ["It is.<|said|><|end|>", "Because.<|said|><|end|>"]
