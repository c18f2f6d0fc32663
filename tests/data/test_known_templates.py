"""The chat templates of many model families, as trl ships them: on each, the answers and nothing else are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from known_templates import SPECIAL, TEMPLATES

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat
from peftctl.errors import DataError

REFUSED = {
    "glm4moe": "the stop token is never trained",  # the next question's header stops it; the last answer has none
    "idefics3": "is in doubt",  # these expect lists of parts, with images
    "llava_next": "the chat template refuses this conversation",
    "smolvlm": "is in doubt",
}
LEADS = {
    "",
    "<think>\n\n</think>\n\n",
    "\n</think>\n\n",
    "</think>",
    "<|channel|>final<|message|>",
    " to=user<|message|>",
}
MESSAGES = [
    {"role": "user", "content": "Why is it?"},
    {"role": "assistant", "content": "It is because."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "The fox."},
]


@pytest.mark.skipif(not TEMPLATES, reason="trl, which holds the templates, is not installed")
def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 20
    assert set(TEMPLATES) > set(REFUSED)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_nothing_else_are_trained(name: str, make_tokenizer: Callable[..., Any]) -> None:
    template = TEMPLATES[name].read_text("utf-8")
    roles = {f"<|{role}|>" for role in ("bos", "eos", "user", "assistant", "system", "end")}
    tokens = sorted(roles | set(SPECIAL.findall(template)))
    tokenizer = make_tokenizer(template, tokens, bos_token="<|bos|>", eos_token="<|eos|>")
    encoder = Encoder(tokenizer, template, 2048, "truncate")
    if name in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name]):
            encoder.encode(Chat("rows.jsonl:1", MESSAGES))
        return
    row = encoder.whole(Chat("rows.jsonl:1", MESSAGES))
    assert row.input_ids == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    answers = [message["content"] for message in MESSAGES if message["role"] == "assistant"]
    for (start, end), answer in zip(row.spans, answers, strict=True):
        lead, _, stop = tokenizer.decode(row.ids[start:end]).partition(answer)
        assert lead in LEADS
        assert stop in tokens
    rest = tokenizer.decode([id for id, label in zip(row.ids, row.labels, strict=True) if label == -100])
    assert not any(answer in rest for answer in answers)
