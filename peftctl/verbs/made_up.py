"""Rows of every form, for recipes whose data is not here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def made_up(form: str, labels: Sequence[str], rows: int) -> list[dict[str, Any]]:
    """So many rows of a form of `data.formats`; `auto` is a conversation. Answers are the labels in turn, if any."""
    answers = [labels[number % len(labels)] if labels else f"{number + 1}." for number in range(rows)]
    return [row(form, f"What follows {number}?", answer, number) for number, answer in enumerate(answers)]


def row(form: str, question: str, answer: str, number: int) -> dict[str, Any]:
    """One row."""
    match form:
        case "sharegpt":
            return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        case "alpaca":
            return {"instruction": "Answer the question.", "input": question, "output": answer}
        case "prompt_completion":
            return {"prompt": question, "completion": f" {answer}"}
        case "preference":
            return {"prompt": question, "chosen": answer, "rejected": "Nobody knows."}
        case "unpaired_preference":
            return {"prompt": question, "completion": answer, "label": number % 2 == 0}
        case "source_target":
            return {"source": question, "target": answer}
        case "text_label":
            return {"text": question, "label": answer}
        case "tokens_tags":
            return {"tokens": question.split(), "tags": [answer] * len(question.split())}
        case "image_text":
            return {"image": f"{number}.png", "text": answer}
        case "text":
            return {"text": f"{question} {answer} And so it goes on, one after the other."}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
