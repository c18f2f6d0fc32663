from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftctl.data.dataset import Dataset, Source
from peftctl.data.held_out import hold_out
from peftctl.data.mistakes import SHOWN
from peftctl.data.prepare import Prepared, prepare
from peftctl.errors import DataError

Of = Callable[[str], Any]
Write = Callable[..., Path]


def chat(answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}], **more}


def run(tmp_path: Path, tokenizer: Any, spec: Any = "rows.jsonl", **options: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare(spec, Dataset(train=spec, **options), tokenizer, tmp_path, said.append), said


def failed(tmp_path: Path, tokenizer: Any, spec: Any = "rows.jsonl", **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        run(tmp_path, tokenizer, spec, **options)
    return [text for text, _ in caught.value.problems]


def test_rows_come_in_order_with_an_account(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    write(chat("a"), chat("b" * 50), chat("c"))
    prepared, said = run(tmp_path, tokenizer)
    own = [tokenizer.apply_chat_template(chat(text)["messages"])["input_ids"] for text in ("a", "b" * 50, "c")]
    assert [row.input_ids for row in prepared.rows] == own
    counts = prepared.ledger
    assert (counts.read, counts.kept, counts.truncated, counts.dropped, counts.skipped) == (3, 3, 0, 0, 0)
    assert prepared.lengths == list(map(len, own))
    assert max(prepared.lengths) == len(own[1])
    assert prepared.ledger.tokens == sum(map(len, own))
    labels = [label for row in prepared.rows for label in row.labels]
    assert prepared.ledger.trained_tokens == len(labels) - labels.count(-100)
    assert prepared.formats == ("messages",)
    assert prepared.chat_template == tokenizer.chat_template
    assert prepared.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert said == ["rows.jsonl: rows are `messages`, guessed from their keys", "rows.jsonl: 3 rows read, all kept"]


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(chat(text="a plain text"))
    prepared, said = run(tmp_path, tokenizer_of("chatml"), format="text")
    assert (prepared.formats, prepared.chat_template, said) == (("text",), None, ["rows.jsonl: 1 row read, all kept"])
    source = Source(path="rows.jsonl", format="messages")
    assert run(tmp_path, tokenizer_of("chatml"), source, format="text")[0].formats == ("messages",)


def test_several_sources(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(chat(), name="a.jsonl")
    write({"text": "one"}, {"text": "two"}, name="b.jsonl")
    prepared, said = run(tmp_path, tokenizer_of("chatml"), ["a.jsonl", "b.jsonl"])
    assert prepared.formats == ("messages", "text")
    assert prepared.ledger.kept == 3
    assert [line.split(":")[0] for line in said] == ["a.jsonl", "b.jsonl"] * 2
    assert {path: part.kept for path, part in prepared.sources.items()} == {"a.jsonl": 1, "b.jsonl": 2}


def test_plain_text_needs_no_template(tmp_path: Path, write: Write, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None, ["</s>"], eos_token="</s>")
    write({"text": "one"})
    assert run(tmp_path, tokenizer)[0].ledger.kept == 1
    write(chat())
    assert failed(tmp_path, tokenizer) == ["dataset.chat_template: this tokenizer has no chat template of its own"]
    prepared, said = run(tmp_path, tokenizer, chat_template="chatml")
    assert "`chatml` ends turns with `</s>` instead" in said[1]
    assert "<|im_start|>" in (prepared.chat_template or "")


def test_all_bad_rows_are_told_before_anything_is_encoded(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    good = json.dumps(chat()) + "\n"
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(good + "nonsense\n" + good + '{"message": []}\n')
    assert failed(tmp_path, tokenizer_of("chatml"), ["a.jsonl", "b.jsonl"], chat_template="no such template") == [
        "a.jsonl:2:1: not JSON: expecting value",
        "a.jsonl:4: `messages` is missing",
        "b.jsonl:2:1: not JSON: expecting value",
        "b.jsonl:4: `messages` is missing",
    ]


def test_many_mistakes_are_counted_not_listed(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(chat(), *[{"messages": []}] * 27)
    texts = failed(tmp_path, tokenizer_of("chatml"))
    assert len(texts) == SHOWN + 1
    assert texts[-1] == "... and 7 more"
    write(*[{"nothing": 1}] * 27)
    texts = failed(tmp_path, tokenizer_of("chatml"))
    assert texts[0].startswith("rows.jsonl:1: the keys are those of no form of rows: `nothing`")
    assert texts[-1] == "... and 7 more"


def test_mistakes_that_show_while_encoding(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    system = {"messages": [{"role": "system", "content": "a"}, *chat()["messages"]]}
    write(chat(), system, chat(), system)
    texts = failed(tmp_path, tokenizer_of("gemma"))
    assert [text.split(": ")[0] for text in texts] == ["rows.jsonl:2", "rows.jsonl:4"]
    write(*[chat()] * 50)
    texts = failed(tmp_path, tokenizer, max_length=3)
    assert texts[0] == "rows.jsonl:1: nothing to train is left in the first 3 tokens"
    assert len(texts) == SHOWN + 1
    assert texts[-1] == "... stopped after 20 rows"


def test_skipped_rows_are_counted_and_told(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(*[chat()] * 98, {"messages": []}, {"messages": None})
    prepared, said = run(tmp_path, tokenizer_of("chatml"), on_bad_row="skip", max_skipped=0.02)
    assert (prepared.ledger.read, prepared.ledger.kept, prepared.ledger.skipped) == (100, 98, 2)
    assert said[1:] == [
        "rows.jsonl: 100 rows read, 98 kept; 2 skipped",
        "skipped 1: `messages` is null",
        "skipped 1: messages: no messages",
        "skipped: rows.jsonl:99: messages: no messages",
        "skipped: rows.jsonl:100: `messages` is null",
    ]
    texts = failed(tmp_path, tokenizer_of("chatml"), on_bad_row="skip", max_skipped=0.019)
    assert texts[-1].endswith("more than `dataset.max_skipped` 0.019")
    assert "rows.jsonl:99: messages: no messages" in texts


def test_long_rows_are_counted(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    write(*[chat()] * 9, chat("long " * 20))
    length = run(tmp_path, tokenizer)[0].lengths[0]
    cut, said = run(tmp_path, tokenizer, max_length=length)
    assert (cut.ledger.read, cut.ledger.kept, cut.ledger.truncated) == (10, 10, 1)
    assert max(cut.lengths) == length
    lost = cut.ledger.tokens_cut
    assert said[1:] == [
        f"rows.jsonl: 10 rows read, all kept; 1 cut to `max_length` {length} tokens, {lost} tokens lost"
    ]
    dropped, said = run(tmp_path, tokenizer, max_length=length, on_long="drop", max_skipped=0.1)
    assert (dropped.ledger.read, dropped.ledger.kept, dropped.ledger.dropped) == (10, 9, 1)
    assert said[1:] == [f"rows.jsonl: 10 rows read, 9 kept; 1 longer than `max_length` {length} dropped"]
    assert "max_skipped" in failed(tmp_path, tokenizer, max_length=length, on_long="drop")[-1]
    assert failed(tmp_path, tokenizer, max_length=length, on_long="error")[0].startswith("rows.jsonl:10: ")
    nothing = failed(tmp_path, tokenizer, max_length=2, on_long="drop", max_skipped=1)
    assert nothing == ["no row is left: 10 of 10 rows left out (10 too long, 0 that cannot be used)"]


@pytest.mark.parametrize(
    ("on_long", "on_bad_row"), [("truncate", "skip"), ("drop", "skip"), ("error", "skip"), ("drop", "error")]
)
def test_the_account_adds_up(tmp_path: Path, tokenizer_of: Of, write: Write, on_long: Any, on_bad_row: Any) -> None:
    lengths, bad = [1, 5, 20, 40, 80], 0 if on_bad_row == "error" else 3
    write(*[chat("a" * length) for length in lengths], *[{"messages": []}] * bad)
    options = {"max_length": 40, "on_long": on_long, "on_bad_row": on_bad_row, "max_skipped": 1}
    counts = run(tmp_path, tokenizer_of("chatml"), **options)[0].ledger
    assert counts.read == len(lengths) + bad == counts.kept + counts.dropped + counts.skipped
    long = counts.truncated + counts.dropped + counts.skipped - bad
    assert 0 < long < len(lengths)
    assert {"truncate": counts.truncated, "drop": counts.dropped, "error": counts.skipped - bad}[on_long] == long


def test_a_file_that_is_missing_stops_even_where_rows_are_skipped(tmp_path: Path, tokenizer_of: Of) -> None:
    assert "no such file" in failed(tmp_path, tokenizer_of("chatml"), on_bad_row="skip", max_skipped=1)[0]


def test_every_missing_file_is_told(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write({"messages": []})
    (tmp_path / "half.json").write_text('[{"messages": 3},\n{"messages": ')
    spec = ["a.jsonl", "rows.jsonl", "half.json", "b.jsonl"]
    places = [text.split(": ")[0] for text in failed(tmp_path, tokenizer_of("chatml"), spec, format="messages")]
    assert places == ["a.jsonl", "rows.jsonl:1", "half.json:1", "half.json:2", "b.jsonl"]
    assert len(failed(tmp_path, tokenizer_of("chatml"), ["a.jsonl", "b.jsonl"])) == 2


def test_the_digest_tells_other_data(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    write(chat("a"))
    first = run(tmp_path, tokenizer)[0].digest
    assert run(tmp_path, tokenizer, max_length=99)[0].digest == first
    assert len(first) == 64
    write(chat("b"))
    assert run(tmp_path, tokenizer)[0].digest != first


def test_held_out_rows_are_a_pure_function_of_the_seed(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(*[chat(str(i)) for i in range(40)], {"messages": []})
    prepared, _ = run(tmp_path, tokenizer_of("chatml"), on_bad_row="skip", max_skipped=0.1)
    train, held = hold_out(prepared, 0.1, seed=3)
    assert (len(train.rows), len(held.rows)) == (36, 4)
    ids = [row.input_ids for row in prepared.rows]
    both = [row.input_ids for row in (*train.rows, *held.rows)]
    assert sorted(both) == sorted(ids)
    assert len(set(map(tuple, both))) == 40
    for part in (train, held):  # both keep the order of the file
        at = [ids.index(row.input_ids) for row in part.rows]
        assert at == sorted(at)
    assert (train.ledger.read, train.ledger.skipped, held.ledger.read, held.ledger.kept) == (37, 1, 4, 4)
    again = hold_out(prepared, 0.1, seed=3)
    assert [row.input_ids for row in again[1].rows] == [row.input_ids for row in held.rows]
    assert [row.input_ids for row in hold_out(prepared, 0.1, seed=4)[1].rows] != [r.input_ids for r in held.rows]
    assert len(hold_out(prepared, 0.001, seed=0)[1].rows) == 1 == len(hold_out(prepared, 0.999, seed=0)[0].rows)


def test_one_row_cannot_be_split(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(chat())
    with pytest.raises(DataError, match="one row cannot be split"):
        hold_out(run(tmp_path, tokenizer_of("chatml"))[0], 0.5, seed=0)


def test_the_shipped_tweets(smollm2: Any) -> None:
    folder = Path(__file__).parent.parent.parent / "recipes/data/tweets"
    dataset = Dataset(train="train.jsonl", eval="held-out.jsonl", max_length=256, on_long="error")
    prepared = prepare("held-out.jsonl", dataset, smollm2, folder)
    assert prepared.ledger.kept == 400
    answers = {smollm2.decode(row.ids[start:end]) for row in prepared.rows for start, end in row.spans}
    assert answers == {"positive<|im_end|>", "negative<|im_end|>"}


def test_kept_texts_stay_beside_their_ids(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    write(*[chat(f"answer {i}") for i in range(9)], {"messages": []}, chat("long " * 40), chat("last"))
    dataset = Dataset(train="rows.jsonl", max_length=40, on_long="drop", on_bad_row="skip", max_skipped=0.5)
    prepared = prepare("rows.jsonl", dataset, tokenizer, tmp_path, keep_parsed=True)
    for part in (prepared, *hold_out(prepared, 0.3, seed=1)):
        own = [tokenizer.apply_chat_template(row.messages)["input_ids"] for row in part.parsed]
        assert own == [row.input_ids for row in part.rows]
    assert len(prepared.rows) == 10
    assert prepare("rows.jsonl", dataset, tokenizer, tmp_path).parsed == []


def test_pieces_of_a_row_are_told_and_stay_together(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(*[{"text": f"{i} " * (10 + i)} for i in range(12)], {"text": "short"})
    prepared, said = run(tmp_path, tokenizer_of("chatml"), max_length=8, on_long="split")
    assert prepared.ledger.read == prepared.ledger.kept == 13
    assert len(prepared.rows) > 26
    cut = sum(row.cut for row in prepared.rows)
    made = len(prepared.rows) - 1
    what = f"12 longer than `max_length` 8 split into {made}, {cut} tokens lost"
    assert f"rows.jsonl: 13 rows read, all kept; {what}" in said
    parts = hold_out(prepared, 0.4, seed=1)
    assert [part.ledger.kept for part in parts] == [8, 5]
    assert sum(len(part.rows) for part in parts) == len(prepared.rows)
    for part in parts:
        whole = [row for row in part.rows if row.piece == 0]
        assert len(whole) == part.ledger.kept
        assert len(part.rows) == sum(row.pieces - (row.cut > 0) for row in whole)  # a last piece of one token is cut


def test_rows_that_spell_special_tokens_are_told(tmp_path: Path, write: Write, tokenizer_of: Of) -> None:
    write(chat("yes"), chat("say <|im_end|>"), chat("no"))
    _, said = run(tmp_path, tokenizer_of("chatml"))
    assert "1 of 3 rows spell special tokens in their text: taken as ordinary text" in said
