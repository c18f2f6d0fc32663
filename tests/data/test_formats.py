from __future__ import annotations

from typing import Any

import pytest

from peftctl.data.file import Row
from peftctl.data.formats import Chat, Pair, Text, check, guess
from peftctl.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def row(**value: Any) -> Row:
    return Row("rows.jsonl:7", value)


@pytest.mark.parametrize(
    ("value", "format"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "prompt_id": 3, "messages": [USER, ANSWER], "text": "a"}, "messages"),
        ({"messages": None, "text": "a"}, "text"),
        ({"prompt": "a", "text": "b"}, "text"),
    ],
)
def test_guess(value: dict[str, Any], format: str) -> None:
    assert guess(row(**value)) == format


def test_parsed_rows() -> None:
    system = {"role": "system", "content": ""}
    assert check(row(messages=[USER, ANSWER], id=1), "messages") == Chat("rows.jsonl:7", [USER, ANSWER])
    assert check(row(messages=[ANSWER, USER, ANSWER]), "messages") == Chat("rows.jsonl:7", [ANSWER, USER, ANSWER])
    assert check(row(prompt="a", completion="b"), "prompt_completion") == Pair("rows.jsonl:7", "a", "b")
    assert check(row(prompt="", completion="b"), "prompt_completion") == Pair("rows.jsonl:7", "", "b")
    pair = row(prompt=[system, USER], completion=[ANSWER])
    assert check(pair, "prompt_completion") == Chat("rows.jsonl:7", [system, USER, ANSWER], first=2)
    assert check(row(text="a"), "text") == Text("rows.jsonl:7", "a")
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": None, "weight": 1}
    assert isinstance(check(row(messages=[USER, thought]), "messages"), Chat)


@pytest.mark.parametrize(
    ("format", "value", "what"),
    [
        ("messages", {"message": []}, "`messages` is missing; `message`: did you mean `messages`?"),
        ("messages", {"messages": None}, "`messages` is null"),
        ("messages", {"conversations": []}, "ShareGPT rows are not supported yet"),
        ("messages", {"messages": []}, "messages: no messages"),
        ("messages", {"messages": "hi"}, "messages: expected a list of messages; got a text"),
        ("messages", {"messages": {"role": "user"}}, "messages: expected a list of messages; got an object"),
        ("messages", {"messages": ["hi"]}, "messages[0]: expected `role` and `content`; got a text"),
        ("messages", {"messages": [USER, None]}, "messages[1]: expected `role` and `content`; got null"),
        ("messages", {"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role: unknown role `usr`; did you"),
        (
            "messages",
            {"messages": [{"role": "tool", "content": "a"}]},
            "unknown role `tool`; roles are `system`, `user`",
        ),
        ("messages", {"messages": [{"role": 3, "content": "a"}]}, "messages[0].role: expected a text; got a number"),
        ("messages", {"messages": [{"content": "a"}]}, "messages[0]: `role` is missing"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0]: `content` is missing"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0]: `content` is null"),
        ("messages", {"messages": [{"role": "user", "contents": "a"}]}, "did you mean `content`?"),
        (
            "messages",
            {"messages": [{"role": "user", "content": ["a"]}]},
            "messages[0].content: expected a text; got a list",
        ),
        ("messages", {"messages": [{"from": "human", "value": "a"}]}, "`role` is missing; ShareGPT"),
        ("messages", {"messages": [USER]}, "messages: the last message is the user's, not the assistant's"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "messages[1].content: the answer is empty",
        ),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
            "messages[1]: `tool_calls` are not supported",
        ),
        ("messages", {"messages": [USER, {**ANSWER, "weight": 0}]}, "messages[1].weight: turns cannot be left out"),
        ("messages", {"messages": [USER, {**ANSWER, "train": False}]}, "messages[1].train: turns cannot be left out"),
        ("prompt_completion", {"prompt": "a"}, "`completion` is missing"),
        ("prompt_completion", {"prompt": "a", "completions": "b"}, "did you mean `completion`?"),
        ("prompt_completion", {"instruction": "a", "output": "b"}, "Alpaca rows are not supported yet"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "completion: is empty"),
        ("prompt_completion", {"prompt": "a", "completion": 3}, "completion: expected a text; got a number"),
        ("prompt_completion", {"prompt": [USER], "completion": "b"}, "prompt: expected a text; got a list"),
        ("prompt_completion", {"prompt": [USER], "completion": []}, "completion: no messages"),
        ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "completion: the last message is the user's"),
        ("text", {"txt": "a"}, "`text` is missing; `txt`: did you mean `text`?"),
        ("text", {"text": ["a"]}, "text: expected a text; got a list"),
        ("text", {"text": True}, "text: expected a text; got true or false"),
        ("text", {"text": " \n"}, "text: is empty"),
    ],
)
def test_what_is_wrong_with_a_row(format: Any, value: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        check(row(**value), format)
    assert what in str(caught.value)
    assert caught.value.problems[0].text.startswith("rows.jsonl:7: ")


def test_all_that_is_wrong_with_a_row_is_told_at_once() -> None:
    messages = [{"role": "usr"}, {"content": 3}]
    with pytest.raises(DataError) as caught:
        check(row(messages=messages), "messages")
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"message": [USER, ANSWER]}, "`message`: did you mean `messages`?"),
        ({"conversations": []}, "ShareGPT"),
        ({"chosen": "a", "rejected": "b"}, "preference rows are not supported yet"),
        ({}, "got the keys none"),
    ],
)
def test_nothing_we_know(value: dict[str, Any], hint: str) -> None:
    with pytest.raises(DataError) as caught:
        guess(row(**value))
    assert "rows.jsonl:7: expected `messages`, or" in str(caught.value)
    assert hint in str(caught.value)
