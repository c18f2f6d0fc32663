from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftctl.data.encode import Encoder
from peftctl.data.file import Row
from peftctl.data.formats import Chat, Example, Pair, Text, check
from peftctl.data.supervised import supervised
from peftctl.data.template import find
from peftctl.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

# The two prompts of Stanford Alpaca's train.py; a line break follows them here, as in most later uses.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def chat(asked: str, answer: str) -> Chat:
    return Chat("a:1", [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize(
    ("format", "value", "expected"),
    [
        ("messages", {"messages": [USER, ANSWER]}, Chat("a:1", [USER, ANSWER])),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, Pair("a:1", "a", "b")),
        ("text", {"text": "a"}, Text("a:1", "a")),
        ("text_label", {"text": "a", "label": 0}, chat("a", "0")),
        ("text_label", {"text": "a", "text_pair": "b", "label": "same"}, chat("a\n\nb", "same")),
        ("source_target", {"source": "a", "target": "b"}, chat("a", "b")),
    ],
)
def test_what_is_trained(format: Any, value: dict[str, Any], expected: Example) -> None:
    assert supervised(check(Row("a:1", value), format)) == expected


@pytest.mark.parametrize(
    ("format", "value", "why"),
    [
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "does not train preferences; `task: dpo` learns from both",
        ),
        (
            "preference",
            {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
            "`columns: {messages: chosen}` trains the better one where `chosen` is",
        ),
        (
            "unpaired_preference",
            {"prompt": "a", "completion": "b", "label": True},
            "no use for good and bad answers; `task: kto` learns from both",
        ),
        ("image_text", {"image": "a.png", "text": "b"}, "trains texts, not images; set `format: text`"),
    ],
)
def test_what_is_refused(format: Any, value: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError) as caught:
        supervised(check(Row("a:1", value), format))
    assert str(caught.value).startswith("a:1: supervised fine-tuning ")
    assert why in str(caught.value)


@pytest.mark.parametrize("train_on", ["assistant", "all", ["user", "assistant"]])
@pytest.mark.parametrize("given", ["", "Paris\n\nRome", "Rome", "a | b <|im_end|>"])
@pytest.mark.parametrize("instruction", ["Name the capital.", "Two lines\n\nRome"])
def test_alpaca_rows_are_written_as_alpaca_was_trained(
    tokenizer_of: Callable[[str], Any], given: str, instruction: str, train_on: Any
) -> None:
    tokenizer = tokenizer_of("chatml")
    template = find("alpaca", tokenizer, Path("."), lambda line: None)
    value = {"instruction": instruction, "input": given, "output": "Rome."}
    row = supervised(check(Row("a:1", value), "alpaca"))
    prompt = (WITH_INPUT if given else NO_INPUT).format_map(value) + "\n"
    encoded = Encoder(tokenizer, template, 2048, train_on=train_on).whole(row)
    assert tokenizer.decode(encoded.input_ids) == prompt + "Rome." + tokenizer.eos_token + "\n\n"
    trained = tokenizer.decode([label for label in encoded.labels if label != -100])
    if train_on == "assistant":
        assert trained == "Rome." + tokenizer.eos_token
    elif train_on != "all":
        assert trained.startswith(instruction)
    assert isinstance(row, Chat)
    asked = Encoder(tokenizer, template, 2048).chat_prompt(row.messages[:-1])
    assert tokenizer.decode(asked) == prompt
