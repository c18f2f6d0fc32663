"""The figures and checks of prepared rows, on rows made by hand: what no encoder makes must be seen too."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data import checks
from peftctl.data.batches import Part
from peftctl.data.checks import of_figures, of_leaks, of_padding, of_repeats
from peftctl.data.encode import Encoded
from peftctl.data.inspection import BARS, Census, census, chosen, lengths_of, padding_of
from peftctl.data.visible import visible

Of = Callable[[str], Any]


def row(ids: list[int], *spans: tuple[int, int], **more: Any) -> Encoded:
    return Encoded(array("i", ids), spans, **more)


def places(found: Census, numbers: Any) -> list[str]:
    return [f"rows:{number + 1}" for number in numbers]


@pytest.fixture
def stop(tokenizer_of: Of) -> int:
    return tokenizer_of("chatml").convert_tokens_to_ids("<|im_end|>")


def checked(rows: list[Encoded], tokenizer: Any, stop: int, **options: Any) -> dict[str, Any]:
    found = census(rows, tokenizer, [stop], **options)
    return {check.name: check for check in of_figures(found, places, 8)}


def test_rows_that_are_fine(tokenizer_of: Of, stop: int) -> None:
    found = checked([row([9, 9, 9, stop], (2, 4)), row([9, 8, 7, stop], (1, 4))], tokenizer_of("chatml"), stop)
    assert {check.state for check in found.values()} == {"ok"}
    assert found["trained share"].text == "62 % of the tokens are trained"


def test_a_turn_without_its_stop_token_fails(tokenizer_of: Of, stop: int) -> None:
    rows = [row([9, 9, stop], (1, 3)), row([9, 9, stop, 9, 9, 9], (1, 3), (4, 6)), row([9, 9, stop], (1, 2))]
    found = checked(rows, tokenizer_of("chatml"), stop)["stop tokens"]
    assert (found.state, found.places) == ("failed", ("rows:2", "rows:3"))
    assert found.text == "2 rows with a trained turn that no stop token ends"
    # with all tokens trained, a stop token may stand anywhere in what is trained
    found = checked(rows[:2], tokenizer_of("chatml"), stop, train_on="all")["stop tokens"]
    assert found.state == "ok"


def test_a_turn_that_was_cut_is_a_warning_with_the_count(tokenizer_of: Of, stop: int) -> None:
    cut = row([9] * 8, (2, 8), truncated=True, cut=4)
    found = checked([cut, row([9, 9, stop], (1, 3)), cut], tokenizer_of("chatml"), stop)
    assert (found["stop tokens"].state, found["stop tokens"].places) == ("warning", ("rows:1", "rows:3"))
    assert found["stop tokens"].text.startswith("2 rows cut before the stop token")
    assert (found["lengths"].state, found["lengths"].text) == ("warning", "2 rows (67 %) cut to `max_length` 8")
    # an earlier turn of a cut row has its stop token all the same, or fails
    broken = row([9] * 8, (1, 3), (5, 8), truncated=True)
    assert checked([broken], tokenizer_of("chatml"), stop)["stop tokens"].state == "failed"


def test_few_cut_rows_are_told_and_no_warning(tokenizer_of: Of, stop: int) -> None:
    rows = [row([9, 9, stop], (1, 3))] * 39 + [row([9] * 7 + [stop], (2, 8), truncated=True)]
    found = checked(rows, tokenizer_of("chatml"), stop)["lengths"]
    assert (found.state, found.text) == ("ok", "1 row of 40 cut to `max_length` 8")


def test_pieces_of_a_row_go_on_in_the_next(tokenizer_of: Of, stop: int) -> None:
    pieces = [row([9] * 8, (2, 8), piece=0, pieces=2), row([9, stop], (1, 2), piece=1, pieces=2)]
    rows = [*pieces, *pieces, row([9, 9, stop], (1, 3))]
    found = census(rows, tokenizer_of("chatml"), [stop])
    assert list(found.origins) == [0, 0, 1, 1, 2]
    assert not found.unfinished
    assert not found.empty


def test_a_row_may_begin_with_a_later_piece(tokenizer_of: Of, stop: int) -> None:
    whole = [row([9] * 8, (2, 8), piece=0, pieces=3), row([9, stop], (1, 2), piece=1, pieces=3)]
    late = row([9, stop], (1, 2), piece=2, pieces=3, cut=16)  # the two before it have nothing to train
    found = census([*whole, late, late], tokenizer_of("chatml"), [stop])
    assert list(found.origins) == [0, 0, 1, 2]


def test_rows_that_train_nothing_and_empty_answers(tokenizer_of: Of, stop: int) -> None:
    found = checked([row([9, 9, stop]), row([9, 9, stop], (2, 3))], tokenizer_of("chatml"), stop)
    assert (found["trained rows"].state, found["trained rows"].places) == ("failed", ("rows:1",))
    assert (found["answers"].state, found["answers"].places) == ("warning", ("rows:2",))


def test_little_that_is_trained_is_a_warning(tokenizer_of: Of, stop: int) -> None:
    found = checked([row([9] * 199 + [stop], (198, 200))], tokenizer_of("chatml"), stop)["trained share"]
    assert (found.state, found.text) == ("warning", "1.0 % of the tokens are trained")


def test_unknown_characters_and_bytes(tokenizer_of: Of) -> None:
    gemma, llama2 = tokenizer_of("gemma"), tokenizer_of("llama2")
    unknown, end = gemma.unk_token_id, gemma.convert_tokens_to_ids("<end_of_turn>")
    found = checked([row([9, unknown, unknown, end], (1, 4))], gemma, end)["unknown characters"]
    assert (found.state, found.text) == ("warning", "2 tokens in 1 row stand for what the tokenizer does not know")
    ids = llama2("😀 and so on")["input_ids"]
    found = checked([row([*ids, llama2.eos_token_id], (1, len(ids) + 1))], llama2, 2)["unknown characters"]
    assert found.state == "warning"
    assert found.text.startswith("4 tokens (")


def test_repeats_and_leaks(tokenizer_of: Of, stop: int) -> None:
    def of(*ids: int) -> Census:
        return census([row([id, 9, stop], (1, 3)) for id in ids], tokenizer_of("chatml"), [stop])

    train, held = of(5, 6, 5, 7, 5), of(8, 7, 5)
    assert train.repeats() == [(2, 0), (4, 0)]
    found = of_repeats(train, "train", places)
    assert (found.state, found.places) == ("warning", ("rows:3", "rows:5"))
    assert held.met_in(train) == [(1, 3), (2, 0)]
    (leak,) = of_leaks(train, {"held": held}, {"train": places, "held": places})
    assert (leak.state, leak.places) == ("warning", ("rows:2 = rows:4", "rows:3 = rows:1"))
    assert leak.text == "2 rows of `held` (67 %) trained too"
    assert of_repeats(held, "held", places).state == "ok"
    assert of_leaks(train, {"held": of(1)}, {"train": places, "held": places})[0].state == "ok"


def test_padding_is_really_made_and_compared(tokenizer_of: Of, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml")
    rows = [row([9, 9, stop], (1, 3)), row([9] * 6 + [stop], (4, 7))]
    found = census(rows, tokenizer, [stop])
    assert tokenizer.pad_token_id == stop
    check = of_padding(found, rows, tokenizer, [stop], places)
    assert check.state == "ok"
    assert "which ends answers too" in check.text

    def confused(rows: Any, pad: int, side: str) -> Any:  # as collators do that know padding by its id
        batch = collate(rows, pad, side)
        batch["labels"][batch["input_ids"] == pad] = -100
        return batch

    collate = checks.collate
    monkeypatch.setattr(checks, "collate", confused)
    assert of_padding(found, rows, tokenizer, [stop], places).state == "failed"


def test_a_pad_token_among_the_tokens_of_a_row(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("qwen3")
    pad, stop = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [row([9, 9, stop], (1, 3)), row([9, pad, stop], (1, 3))]
    found = of_padding(census(rows, tokenizer, [stop]), rows, tokenizer, [stop], places)
    assert (found.state, found.places) == ("warning", ("rows:2",))
    found = of_padding(census(rows[:1], tokenizer, [stop]), rows[:1], tokenizer, [stop], places)
    assert (found.state, found.text) == ("ok", "padded with `<|endoftext|>`, which no row has")


def test_rows_worth_looking_at(tokenizer_of: Of, stop: int) -> None:
    rows = [row([9] * (3 + i % 7) + [stop], (1, 4), truncated=i == 50) for i in range(100)]
    found = census(rows, tokenizer_of("chatml"), [stop])
    assert chosen(found, 0) == {}
    assert chosen(found, 1) == {0: "first"}
    assert chosen(found, 3) == {0: "first", 6: "longest", 50: "cut"}
    assert chosen(found, 5) == {0: "first", 6: "longest", 33: "", 50: "cut", 66: ""}
    assert chosen(found, 1000).keys() == set(range(100))
    assert chosen(census(rows[:1], tokenizer_of("chatml"), [stop]), 3) == {0: "first, longest"}


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_the_histogram_has_every_row(lengths: list[int]) -> None:
    found = lengths_of(Census(lengths=array("i", lengths)), 2048)
    bars = found["histogram"]
    assert sum(bar["rows"] for bar in bars) == len(lengths)
    assert len(bars) <= BARS
    for bar in bars:
        assert bar["rows"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
    assert bars[-1]["rows"]
    assert (found["min"], found["max"]) == (min(lengths), max(lengths))
    assert found["median"] in lengths
    assert found["at_max_length"] == lengths.count(2048)


def test_padding_of_a_batch() -> None:
    assert padding_of([4, 4, 4, 4], [Part(4)], 4, 2, 0) == {"padded": 0, "packed": 0}
    found = padding_of([8, 2, 2, 2], [Part(4)], 4, 4, 0)
    assert found["padded"] == pytest.approx(1 - 14 / 32)
    assert found["packed"] == pytest.approx(1 - 14 / 16)


TEXTS = ["héllo 😀 wörld\n\n  x", "  two  spaces\tand tab ", "<|im_start|>user\nhi<|im_end|>", "日本語 テスト", ""]


@pytest.mark.parametrize("family", ["chatml", "llama2", "gemma"])
@pytest.mark.parametrize("text", TEXTS)
def test_visible_tokens_are_the_text(tokenizer_of: Of, family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer(text)["input_ids"]
    shown = visible(ids, [(1, 3)], tokenizer)
    assert [id for token in shown for id in token.ids] == ids
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False)
    joined = "".join(token.text for token in shown)
    # where what is trained begins or ends inside a character, its bytes are shown apart
    assert joined == whole or "\ufffd" in joined
    at = 0
    for token in shown:
        assert {1 <= at + i < 3 for i in range(len(token.ids))} == {token.trained}
        at += len(token.ids)


def test_special_tokens_are_told_from_their_spelling(tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    ids = tokenizer("<|im_end|>")["input_ids"] + tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    shown = visible(ids, (), tokenizer)
    assert [token.special for token in shown] == [True, *[False] * (len(ids) - 1)]
    assert "".join(token.text for token in shown[1:]) == "<|im_end|>"
