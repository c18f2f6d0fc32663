from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data.file import Row
from peftctl.data.formats import (
    FORMS,
    Captioned,
    Chat,
    Feedback,
    Format,
    Labelled,
    Pair,
    Preference,
    Tagged,
    Text,
    Translated,
    check,
    guess,
)
from peftctl.errors import DataError

AT = "rows.jsonl:7"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def row(**value: Any) -> Row:
    return Row(AT, value)


def test_the_table_has_every_form_under_its_name() -> None:
    assert tuple(FORMS) == get_args(Format)
    assert [name for name, form in FORMS.items() if form.name != name] == []


@pytest.mark.parametrize(
    ("value", "format"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"conversations": [HUMAN, GPT]}, "sharegpt"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "all"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired_preference"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "unpaired_preference"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]}, "preference"),
        ({"source": "a", "target": "b"}, "source_target"),
        ({"source": 3, "target": 4, "text": "a"}, "text"),
        ({"image": "a.png", "text": "b"}, "image_text"),
        ({"image": b"png", "caption": "b", "label": 3}, "image_text"),
        ({"text": "a", "label": 0}, "text_label"),
        ({"tokens": ["a"], "tags": ["O"]}, "tokens_tags"),
        ({"tokens": ["a"], "ner_tags": [0], "text": "a", "label": 0}, "tokens_tags"),
        ({"tokens": ["a"], "text": "a", "label": 0}, "text_label"),
        ({"text": "a", "label": None}, "text"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "prompt_id": 3, "messages": [USER, ANSWER], "text": "a"}, "messages"),
        ({"messages": None, "text": "a"}, "text"),
        ({"prompt": "a", "text": "b"}, "text"),
    ],
)
def test_guess(value: dict[str, Any], format: str) -> None:
    assert guess([row(**value)]) == format


def test_several_rows_are_guessed_together() -> None:
    plain, labelled, nothing = row(text="a", label=None), row(text="a", label="b"), row(name="x")
    assert guess([plain, labelled, labelled]) == "text_label"
    assert guess([labelled, plain, plain]) == "text"
    assert guess([nothing, nothing, nothing, plain]) == "text"
    assert guess([row(messages=[]), row(text="a"), row(source="a", target="b")]) == "messages"


def test_what_is_mapped_is_meant() -> None:
    both = row(messages=[USER, ANSWER], prompt="a", completion="b", text="c")
    assert guess([both]) == "messages"
    assert guess([both], {"completion": "x"}) == "prompt_completion"
    assert guess([both], {"text": "x"}) == "text"


@pytest.mark.parametrize(
    ("format", "value", "expected"),
    [
        ("messages", {"messages": [USER, ANSWER], "id": 1}, Chat(AT, [USER, ANSWER])),
        ("messages", {"messages": [ANSWER, USER, ANSWER]}, Chat(AT, [ANSWER, USER, ANSWER])),
        ("messages", {"messages": [USER, ANSWER], "tools": [TOOL]}, Chat(AT, [USER, ANSWER], tools=[TOOL])),
        ("messages", {"messages": [USER, ANSWER], "tools": json.dumps([TOOL])}, Chat(AT, [USER, ANSWER], tools=[TOOL])),
        ("messages", {"messages": [USER, ANSWER], "tools": ""}, Chat(AT, [USER, ANSWER])),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}]},
            Chat(AT, [USER, ANSWER, USER, ANSWER], flags=(True, False, True, True)),
        ),
        ("messages", {"messages": [{**USER, "weight": 0}, ANSWER]}, Chat(AT, [USER, ANSWER], flags=(False, True))),
        ("messages", {"messages": [USER, {**ANSWER, "train": True, "name": None}]}, Chat(AT, [USER, ANSWER])),
        (
            "messages",
            {"messages": [{**USER, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, ANSWER]},
            Chat(AT, [USER, ANSWER]),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "s"}, HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]},
            Chat(
                AT,
                [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER],
                flags=(True, True, False, True, True),
            ),
        ),
        (
            "sharegpt",
            {"conversations": [HUMAN, {**GPT, "train": False}, HUMAN, GPT], "system": "s"},
            Chat(
                AT,
                [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER],
                flags=(True, True, False, True, True),
            ),
        ),
        ("sharegpt", {"conversations": [USER, ANSWER], "system": ""}, Chat(AT, [USER, ANSWER])),
        (
            "sharegpt",
            {
                "conversations": [
                    HUMAN,
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                    GPT,
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            Chat(
                AT,
                [
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "2"},
                    ANSWER,
                ],
                tools=[TOOL["function"]],
            ),
        ),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}, Chat(AT, [USER, ANSWER])),
        ("alpaca", {"instruction": "hi", "input": None, "output": "hello", "history": []}, Chat(AT, [USER, ANSWER])),
        (
            "alpaca",
            {"instruction": "add", "input": "1 1", "output": "2", "system": "s", "history": [["hi", "hello"]]},
            Chat(
                AT,
                [
                    {"role": "system", "content": "s"},
                    USER,
                    ANSWER,
                    {"role": "user", "content": "add\n\n1 1", "input": "1 1"},
                    {"role": "assistant", "content": "2"},
                ],
            ),
        ),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, Pair(AT, "a", "b")),
        ("prompt_completion", {"prompt": "", "completion": "b"}, Pair(AT, "", "b")),
        (
            "prompt_completion",
            {"prompt": [{"role": "system", "content": ""}, USER], "completion": [{**ANSWER, "weight": 0}, ANSWER]},
            Chat(
                AT,
                [{"role": "system", "content": ""}, USER, ANSWER, ANSWER],
                first=2,
                flags=(True, True, False, True),
            ),
        ),
        ("source_target", {"source": "a", "target": "b"}, Translated(AT, "a", "b")),
        ("text_label", {"text": "a", "label": "b"}, Labelled(AT, "a", "b")),
        ("text_label", {"text": "a", "label": 0, "text_pair": "c"}, Labelled(AT, "a", 0, "c")),
        ("text_label", {"text": "a", "label": "1"}, Labelled(AT, "a", "1")),
        ("text_label", {"text": "a", "label": " b\n"}, Labelled(AT, "a", "b")),
        ("tokens_tags", {"tokens": ["a", "b"], "tags": ["O", "B-X"]}, Tagged(AT, ["a", "b"], ["O", "B-X"])),
        ("tokens_tags", {"tokens": ["a"], "ner_tags": [3], "tags": None}, Tagged(AT, ["a"], [3])),
        ("tokens_tags", {"tokens": ["a"], "labels": [0]}, Tagged(AT, ["a"], [0])),
        ("text", {"text": "a"}, Text(AT, "a")),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, Preference(AT, "a", "b", "c")),
        (
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            Preference(AT, [USER], [ANSWER], [OTHER]),
        ),
        (
            "preference",
            {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            Preference(AT, [USER], [ANSWER], [OTHER]),
        ),
        (
            "preference",
            {"prompt": "hi", "chosen": [ANSWER], "rejected": [OTHER]},
            Preference(AT, [USER], [ANSWER], [OTHER]),
        ),
        (
            "preference",
            {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]},
            Preference(AT, [USER, ANSWER, USER], [ANSWER], [OTHER]),
        ),
        (
            "unpaired_preference",
            {"prompt": "a", "completion": "b", "label": False},
            Feedback(AT, "a", "b", False),
        ),
        (
            "unpaired_preference",
            {"prompt": [USER], "completion": [ANSWER], "label": "TRUE"},
            Feedback(AT, [USER], [ANSWER], True),
        ),
        ("image_text", {"image": "a.png", "text": "b"}, Captioned(AT, "a.png", "b")),
        ("image_text", {"image": {"bytes": b"png", "path": None}, "caption": "b"}, Captioned(AT, b"png", "b")),
        ("image_text", {"image": {"bytes": None, "path": "a.png"}, "caption": "b"}, Captioned(AT, "a.png", "b")),
    ],
)
def test_parsed_rows(format: Any, value: dict[str, Any], expected: Any) -> None:
    assert check(row(**value), format) == expected


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "arguments": '{"a": 1}'},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "let me add"}])
def test_calls_of_tools_have_one_form(call: dict[str, Any], content: dict[str, Any]) -> None:
    said = [USER, {"role": "assistant", **content, "tool_calls": [call]}, {"role": "tool", "content": "2"}, ANSWER]
    parsed = check(row(messages=said), "messages")
    assert isinstance(parsed, Chat)
    said_too = content or {"content": ""}  # templates read it in every message
    assert parsed.messages == [USER, {"role": "assistant", **said_too, "tool_calls": [CALL]}, *said[2:]]


def test_what_belongs_to_a_call_is_kept_and_nothing_of_the_row_is_changed() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    said = [USER, {"role": "assistant", "tool_calls": json.dumps([call])}]
    before = json.dumps(said)
    parsed = check(row(messages=said), "messages")
    assert isinstance(parsed, Chat)
    assert parsed.messages[1]["tool_calls"] == [{**call, "function": {"name": "now", "arguments": {}}}]
    assert json.dumps(said) == before


def messages(*said: Any) -> dict[str, Any]:
    return {"messages": list(said)}


def turns(*said: Any) -> dict[str, Any]:
    return {"conversations": list(said)}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"mesages": []}, "`messages` is missing; `mesages`: did you mean `messages`?"),
    ("messages", {"message": [USER]}, "`messages` is missing; `columns: {messages: message}` maps them"),
    ("messages", {"messages": None}, "`messages` is null"),
    ("messages", turns(HUMAN), "`messages` is missing; it looks like `sharegpt`, and is read as `messages`"),
    ("messages", messages(), "messages: no messages"),
    ("messages", {"messages": "hi"}, "messages: expected a list of messages; got a text"),
    ("messages", {"messages": USER}, "messages: expected a list of messages; got an object"),
    ("messages", messages("hi"), "messages[0]: expected `role` and `content`; got a text"),
    ("messages", messages(USER, None), "messages[1]: expected `role` and `content`; got null"),
    (
        "messages",
        messages({"role": "usr", "content": "a"}),
        "messages[0].role: unknown role `usr`; did you mean `user`?",
    ),
    ("messages", messages({"role": "bot", "content": "a"}), "unknown role `bot`; `assistant` is its name here"),
    ("messages", messages({"role": "Human", "content": "a"}), "unknown role `Human`; `user` is its name here"),
    ("messages", messages({"role": "developer", "content": "a"}), "unknown role `developer`; `system` is its name"),
    ("messages", messages({"role": "z", "content": "a"}), "unknown role `z`; roles are `system`, `user`"),
    ("messages", messages({"role": 3, "content": "a"}), "messages[0].role: expected a text; got a number"),
    ("messages", messages({"content": "a"}), "messages[0]: `role` is missing"),
    ("messages", messages({"role": "user"}), "messages[0]: `content` is missing"),
    ("messages", messages({"role": "user", "content": None}), "messages[0]: `content` is null"),
    ("messages", messages({"role": "user", "contents": "a"}), "did you mean `content`?"),
    ("messages", messages({"role": "user", "content": {"a": 1}}), "expected a text; got an object; an object belongs"),
    ("messages", messages({"role": "user", "content": []}), "messages[0].content: no parts"),
    ("messages", messages({"role": "user", "content": ["a"]}), "messages[0].content[0]: expected a part with its type"),
    (
        "messages",
        messages({"role": "user", "content": [{"type": "image"}]}),
        "content[0]: a part of type `image`; a conv",
    ),
    (
        "messages",
        messages({"role": "user", "content": [{"type": "text"}]}),
        "content[0]: expected a part with its type",
    ),
    ("messages", messages(HUMAN), "messages[0]: `role` is missing; turns with `from` and `value` are ShareGPT's"),
    ("messages", messages(USER), "messages: the last message is the user's, not the assistant's"),
    ("messages", messages(USER, {**ANSWER, "content": " "}), "messages[1].content: the answer is empty"),
    ("messages", messages(USER, {**ANSWER, "tool_calls": [{}]}), "messages[1].tool_calls[0]: the call has no `name`"),
    (
        "messages",
        messages(USER, {**ANSWER, "tool_calls": 3}),
        "messages[1].tool_calls: expected a list of calls; got a n",
    ),
    ("messages", messages(USER, {**ANSWER, "tool_calls": ["a"]}), "tool_calls[0]: expected a call; got a text"),
    (
        "messages",
        messages(USER, {**ANSWER, "tool_calls": [{"name": "a", "arguments": "{1"}]}),
        "messages[1].tool_calls[0].arguments: not JSON (character 2): `{1`",
    ),
    (
        "messages",
        messages(USER, {**ANSWER, "tool_calls": [{"name": "a", "arguments": "[1]"}]}),
        "tool_calls[0].arguments: expected an object; got a list",
    ),
    ("messages", messages(USER, {"role": "assistant", "tool_calls": []}), "messages[1]: `content` is missing"),
    (
        "messages",
        messages({**USER, "tool_calls": [CALL]}, ANSWER),
        "only the assistant calls tools, and this is the user's",
    ),
    (
        "messages",
        messages(USER, {**ANSWER, "function_call": {"name": "a"}}),
        "messages[1]: `function_call` is an old form",
    ),
    ("messages", messages(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight: expected 0 or 1; got 0.5"),
    ("messages", messages(USER, {**ANSWER, "weight": "0"}), "messages[1].weight: expected 0 or 1; got a text"),
    ("messages", messages(USER, {**ANSWER, "train": "no"}), "messages[1].train: expected true or false; got a text"),
    ("messages", messages(USER, {**ANSWER, "train_detail": [1]}), "messages[1].train_detail: parts of a turn cannot"),
    (
        "messages",
        {**messages(USER, ANSWER), "tools": {"name": "a"}},
        "tools: expected a list of functions; got an object",
    ),
    ("messages", {**messages(USER, ANSWER), "tools": "[1"}, "tools: not JSON (character 3): `[1`"),
    ("messages", {**messages(USER, ANSWER), "tools": ["a"]}, "tools[0]: expected a function with its name; got a text"),
    ("messages", {**messages(USER, ANSWER), "tools": [{"type": "function"}]}, "tools[0]: the function has no `name`"),
    (
        "sharegpt",
        {"conversation": [HUMAN]},
        "`conversations` is missing; `conversation`: did you mean `conversations`?",
    ),
    ("sharegpt", {"conversations": "a"}, "conversations: expected a list of turns; got a text"),
    ("sharegpt", turns(), "conversations: no turns"),
    ("sharegpt", turns("a"), "conversations[0]: expected `from` and `value`; got a text"),
    ("sharegpt", turns({"from": "human"}), "conversations[0]: `value` is missing"),
    (
        "sharegpt",
        turns({"from": "human", "values": "a"}),
        "conversations[0]: `value` is missing; did you mean `value`?",
    ),
    ("sharegpt", turns({"from": 3, "value": "a"}), "conversations[0].from: expected a text; got a number"),
    ("sharegpt", turns({"from": "humans", "value": "a"}), "unknown speaker `humans`; did you mean `human`?"),
    ("sharegpt", turns({"from": "z", "value": "a"}), "unknown speaker `z`; speakers are `system`, `human`, `gpt`"),
    ("sharegpt", turns(HUMAN, {"from": "gpt", "value": 3}), "conversations[1].value: expected a text; got a number"),
    ("sharegpt", turns(HUMAN, {"from": "gpt", "value": ""}), "conversations[1].content: the answer is empty"),
    ("sharegpt", turns(HUMAN), "conversations: the last message is the user's"),
    ("sharegpt", turns(HUMAN, {"from": "function_call", "value": "add"}), "conversations[1].value: not JSON"),
    ("sharegpt", turns(HUMAN, {"from": "function_call", "value": "[]"}), "conversations[1].value: no call"),
    (
        "sharegpt",
        turns(HUMAN, {"from": "function_call", "value": "3"}),
        "conversations[1].value[0]: expected a call; got a",
    ),
    ("sharegpt", {**turns(HUMAN, GPT), "system": 3}, "system: expected a text; got a number"),
    (
        "sharegpt",
        {**turns({"from": "system", "value": "a"}, HUMAN, GPT), "system": "b"},
        "the first turn is a system mess",
    ),
    ("sharegpt", turns(HUMAN, {**GPT, "weight": 2}), "conversations[1].weight: expected 0 or 1; got 2"),
    ("alpaca", {"instruction": "a"}, "`output` is missing"),
    ("alpaca", {"instruction": "a", "outptu": "b"}, "`output` is missing; `outptu`: did you mean `output`?"),
    ("alpaca", {"instruction": "", "output": "b"}, "instruction: is empty"),
    ("alpaca", {"instruction": "a", "output": " "}, "output: is empty"),
    ("alpaca", {"instruction": 3, "output": "b"}, "instruction: expected a text; got a number"),
    ("alpaca", {"instruction": "a", "output": "b", "input": ["c"]}, "input: expected a text; got a list"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, "history: expected a list of questions with"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0]: expected a question and its answer",
    ),
    ("prompt_completion", {"prompt": "a"}, "`completion` is missing"),
    ("prompt_completion", {"prompt": "a", "completions": "b"}, "did you mean `completion`?"),
    (
        "prompt_completion",
        {"question": "a", "answer": "b"},
        "`columns: {prompt: question, completion: answer}` maps them",
    ),
    (
        "prompt_completion",
        {"instruction": "a", "output": "b"},
        "it looks like `alpaca`, and is read as `prompt_completion`",
    ),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "completion: is empty"),
    ("prompt_completion", {"prompt": "a", "completion": 3}, "completion: expected a text; got a number"),
    ("prompt_completion", {"prompt": [USER], "completion": "b"}, "prompt: expected a text; got a list"),
    ("prompt_completion", {"prompt": [USER], "completion": []}, "completion: no messages"),
    ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "completion: the last message is the user's"),
    ("text", {"txt": "a"}, "`text` is missing; `txt`: did you mean `text`?"),
    ("text", {"text": ["a"]}, "text: expected a text; got a list"),
    ("text", {"text": True}, "text: expected a text; got true or false"),
    ("text", {"text": " \n"}, "text: is empty"),
    ("tokens_tags", {"tags": ["O"]}, "`tokens` is missing"),
    ("tokens_tags", {"tokens": ["a"]}, "`tags` is missing"),
    ("tokens_tags", {"tokens": ["a"], "tags": ["O"], "labels": [0]}, "both `tags` and `labels`"),
    ("tokens_tags", {"tokens": "a b", "tags": ["O"]}, "tokens: expected a list of texts; got a text"),
    ("tokens_tags", {"tokens": [], "tags": []}, "tokens: is empty"),
    ("tokens_tags", {"tokens": ["a", 3], "tags": ["O", "O"]}, "tokens[1]: expected a text; got a number"),
    ("tokens_tags", {"tokens": ["a", " "], "tags": ["O", "O"]}, "tokens[1]: is empty"),
    ("tokens_tags", {"tokens": ["a"], "tags": "O"}, "tags: expected a list of texts or of whole numbers; got a text"),
    ("tokens_tags", {"tokens": ["a"], "ner_tags": [True]}, "ner_tags[0]: expected a text or a whole number; got true"),
    ("tokens_tags", {"tokens": ["a"], "tags": [""]}, "tags[0]: is empty"),
    ("tokens_tags", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens have 1 tags"),
    ("text_label", {"text": "a"}, "`label` is missing"),
    ("text_label", {"text": "a", "label": 0.5}, "label: expected a text or a whole number; got a number"),
    ("text_label", {"text": "a", "label": True}, "label: expected a text or a whole number; got true or false"),
    ("text_label", {"text": "a", "label": ["b"]}, "label: expected a text or a whole number; got a list"),
    ("text_label", {"text": "a", "label": ""}, "label: is empty"),
    ("text_label", {"text": "a", "label": "b", "text_pair": 3}, "text_pair: expected a text; got a number"),
    ("source_target", {"source": "a"}, "`target` is missing"),
    ("source_target", {"source": "a", "target": 3}, "target: expected a text; got a number"),
    ("source_target", {"source": " ", "target": "b"}, "source: is empty"),
    (
        "source_target",
        {"translation": {"en": "a", "fr": "b"}},
        "`source` is missing; `columns: {source: translation.en, target: translation.fr}`",
    ),
    ("preference", {"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
    (
        "preference",
        {"chosen": "b", "rejected": "c"},
        "`prompt` is missing; without it, `chosen` and `rejected` are whole",
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are the same"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: is empty"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": [OTHER]}, "rejected: expected a text; got a list"),
    ("preference", {"prompt": [USER], "chosen": "a", "rejected": "b"}, "prompt: expected a text; got a list"),
    ("preference", {"chosen": [], "rejected": [OTHER]}, "chosen: no messages"),
    ("preference", {"chosen": [USER], "rejected": [USER, OTHER]}, "chosen: the last message is the user's"),
    (
        "preference",
        {"chosen": [ANSWER], "rejected": [OTHER]},
        "begin with different messages, so they answer no common",
    ),
    (
        "preference",
        {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "z"}, OTHER]},
        "`chosen` and `rejected` begin with different messages",
    ),
    (
        "preference",
        {"prompt": "why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        "prompt: is not what `chosen` and `rejected` begin with",
    ),
    ("unpaired_preference", {"prompt": "a", "completion": "b"}, "`label` is missing"),
    (
        "unpaired_preference",
        {"prompt": "a", "completion": "b", "label": 1},
        "label: expected true or false; got a number",
    ),
    (
        "unpaired_preference",
        {"prompt": "a", "completion": 3, "label": True},
        "completion: expected a text; got a number",
    ),
    ("image_text", {"image": "a.png"}, "neither `text` nor `caption`"),
    ("image_text", {"image": "a.png", "text": "b", "caption": "c"}, "both `text` and `caption`"),
    ("image_text", {"image": 3, "text": "b"}, "image: expected a path or the bytes of an image; got a number"),
    (
        "image_text",
        {"image": {"bytes": None}, "text": "b"},
        "image: expected a path or the bytes of an image; got an obj",
    ),
    ("image_text", {"image": " ", "text": "b"}, "image: is empty"),
]


@pytest.mark.parametrize(("format", "value", "what"), WRONG)
def test_what_is_wrong_with_a_row(format: Any, value: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        check(row(**value), format)
    assert what in str(caught.value)
    assert all(problem.text.startswith(f"{AT}: ") for problem in caught.value.problems)


def test_every_form_is_tried_with_mistakes() -> None:
    assert {format for format, _, _ in WRONG} == set(FORMS)


def test_all_that_is_wrong_with_a_row_is_told_at_once() -> None:
    messages = [{"role": "usr"}, {"content": 3}]
    with pytest.raises(DataError) as caught:
        check(row(messages=messages), "messages")
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"mesages": [USER, ANSWER]}, "`mesages`: did you mean `messages`?"),
        ({"conversation": [USER, ANSWER]}, "`columns: {messages: conversation}` maps them"),
        ({"question": "a", "answer": "b"}, "`columns: {prompt: question, completion: answer}` maps them"),
        ({"sentence": "a", "label": 1}, "`columns: {text: sentence}` maps them"),
        ({"translation": {"de": "a", "en": "b"}}, "`columns: {source: translation.de, target: translation.en}`"),
        ({}, "form of rows: none; rows have `chosen` and `rejected`; `messages`;"),
    ],
)
def test_nothing_we_know(value: dict[str, Any], hint: str) -> None:
    with pytest.raises(DataError) as caught:
        guess([row(**value)])
    assert f"{AT}: the keys are those of no form of rows: " in str(caught.value)
    assert hint in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
WORDS = st.sampled_from(
    ["user", "assistant", "gpt", "function_call", "text", "image", "[]", '{"name": "a"}', "[[", "0"]
)
NAMES = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "weight",
        "train",
        "type",
        "text",
    ]
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_row_raises_anything_else(data: st.DataObject) -> None:
    form = FORMS[data.draw(st.sampled_from(list(FORMS)))]
    value = {key: data.draw(VALUES) for key in form.required}
    value |= {key: data.draw(VALUES) for key in form.optional if data.draw(st.booleans())}
    for attempt in (lambda: check(Row(AT, value), form.name), lambda: guess([Row(AT, value)])):
        with suppress(DataError):
            attempt()
