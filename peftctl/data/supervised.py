"""Rows as supervised fine-tuning trains them: conversations, pairs and texts; what it cannot train is refused."""

from __future__ import annotations

from peftctl.data.formats import (
    Captioned,
    Chat,
    Example,
    Feedback,
    Labelled,
    Message,
    Parsed,
    Preference,
    Tagged,
    Translated,
)
from peftctl.errors import DataError


def supervised(example: Example) -> Parsed:
    """The example as a conversation, a pair or a text. Raises DataError for one that has no answer to train.

    A class is the answer to its text (two texts stand apart by a blank line), a target the answer to its source.
    """
    match example:
        case Labelled():
            text = example.text if example.pair is None else f"{example.text}\n\n{example.pair}"
            return _chat(example.place, text, str(example.label))
        case Translated():
            return _chat(example.place, example.source, example.target)
        case Preference():
            hint = "`task: dpo` learns from both answers; `columns: {completion: chosen}` trains the better one"
            if not isinstance(example.chosen, str):
                hint = (
                    "`task: dpo` learns from both answers; `columns: {messages: chosen}` trains the better one where "
                    "`chosen` is a whole conversation, `{completion: chosen}` where it is only the answer"
                )
            raise DataError(f"{example.place}: supervised fine-tuning does not train preferences", hint)
        case Feedback():
            hint = "`task: kto` learns from both; `format: prompt_completion` trains every completion"
            raise DataError(f"{example.place}: supervised fine-tuning has no use for good and bad answers", hint)
        case Tagged():
            hint = "`task: token_classification` trains them"
            raise DataError(f"{example.place}: supervised fine-tuning has no use for words with tags", hint)
        case Captioned():
            hint = "set `format: text` to train the texts alone"
            raise DataError(f"{example.place}: supervised fine-tuning trains texts, not images", hint)
    return example


def _chat(place: str, asked: str, answer: str) -> Chat:
    said: list[Message] = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Chat(place, said)


def one_exchange(chat: Chat) -> tuple[str, str] | None:
    """What is asked and what is answered in a conversation of one turn each; a system message before is left out."""
    said = [message for message in chat.messages if message["role"] != "system"]
    if [message["role"] for message in said] != ["user", "assistant"]:
        return None
    if not all(isinstance(message.get("content"), str) for message in said):
        return None
    return said[0]["content"], said[1]["content"]
