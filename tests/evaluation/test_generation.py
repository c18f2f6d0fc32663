"""Batches padded on the left answer as each prompt does alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_chat
import torch

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat, Pair, Text
from peftctl.errors import DataError, RunError
from peftctl.evaluation.generation import continuations, generate, stop_ids
from peftctl.models.positions import positions

PROMPTS = ["b", "is it k!?", "a longer question, with more in it", "z!!"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny.build(request.param)
    tiny.stir(made, 3)
    return made


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_chat.tokenizer(), tiny_chat.TEMPLATE, 2048, "truncate")


def alone(model: Any, encoder: Encoder, ids: list[int], tokens: int = 10) -> str:
    """Greedy, token by token, without padding, cache or `generate`."""
    said: list[int] = []
    while len(said) < tokens and (not said or said[-1] not in stop_ids(model, encoder)):
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    return str(encoder.tokenizer.decode(said, skip_special_tokens=True))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_batch_answers_as_each_row_alone(model: Any, encoder: Encoder, size: int):
    rows = [
        Chat(f"rows:{n}", [{"role": "user", "content": text}, {"role": "assistant", "content": "?"}])
        for n, text in enumerate(PROMPTS)
    ]
    ticks: list[tuple[int, int]] = []
    said = generate(model, rows, encoder, 10, size, lambda *tick: ticks.append(tick))
    expected = [alone(model, encoder, encoder.chat_prompt(row.messages[:-1])) for row in rows]
    assert said == expected
    assert len(set(expected)) > 1
    assert ticks[-1] == (4, 4)


def test_the_stop_token_ends_an_answer_and_is_not_told(model: Any, encoder: Encoder):
    ids = encoder.chat_prompt([{"role": "user", "content": "b"}])
    whole = continuations(model, [ids], encoder, 10)[0]
    assert len(whole) > 2
    encoder.stop_ids.add(tiny_chat.WORDS.index(whole[1]))
    cut = continuations(model, [ids], encoder, 10)[0]
    assert cut == whole[: whole.index(whole[1]) + 1]
    assert set(stop_ids(model, encoder)) == {2, tiny_chat.WORDS.index(whole[1])}


def test_the_mode_of_the_model_stays(model: Any, encoder: Encoder):
    ids = encoder.text_prompt("hello")
    expected = continuations(model, [ids], encoder, 5)
    model.train()
    try:
        assert continuations(model, [ids], encoder, 5) == expected
        assert model.training
    finally:
        model.eval()


def test_answers_end_where_the_positions_do(encoder: Encoder):
    model: Any = tiny.build("gpt2")
    most = positions(model) or 0
    ids = encoder.text_prompt("a" * (most - 3))
    said = continuations(model, [ids], encoder, 10)[0]
    assert len(said) <= 3
    with pytest.raises(RunError, match=f"a prompt of {most} tokens, and GPT2LMHeadModel reads {most}, its answer"):
        continuations(model, [encoder.text_prompt("a" * most)], encoder, 10)


def test_prompts_end_where_the_answer_begins(encoder: Encoder):
    decode = encoder.tokenizer.decode
    chat = Chat("rows:1", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    assert decode(encoder.prompt(chat)) == "<bos>u:hi<eos><bos>a:"
    assert decode(encoder.prompt(Pair("rows:1", "one, ", "two"))) == "one, "
    assert decode(encoder.prompt(Text("rows:1", "words"))) == "words"
    assert len(encoder.text_prompt("words<eos>")) == len("words<eos>")  # one token a character: it is text


def test_a_question_needs_a_template():
    bare = Encoder(tiny_chat.tokenizer(), None, 2048, "truncate")
    with pytest.raises(DataError, match="no chat template") as caught:
        bare.chat_prompt([{"role": "user", "content": "hi"}], place="rows:3")
    assert str(caught.value).startswith("rows:3: ")
    assert "dataset.chat_template" in str(caught.value.problems[0].hint)
