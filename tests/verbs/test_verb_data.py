"""`peftctl data` on bad recipes: what is wrong is a check with its place, and the exit code says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat

from peftctl.config.write import to_yaml
from peftctl.data.spelling import Spelling
from peftctl.verbs.data import data

PAGE = Path(__file__).parent / "data_page.txt"


def chat(asked: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a tokenizer, rows and a recipe into the working directory; gives the recipe's name."""
    monkeypatch.chdir(tmp_path)

    def written(rows: Any, held: Any = None, special: str | None = None, trainer: Any = None, **dataset: Any) -> str:
        tokenizer = tiny_chat.tokenizer()
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": [special]})
        tokenizer.save_pretrained("base")
        (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
        tiny_chat.write_rows(tmp_path / "train.jsonl", rows)
        if held is not None:
            tiny_chat.write_rows(tmp_path / "held.jsonl", held)
            dataset = {"eval": "held.jsonl", **dataset}
        recipe = tiny_chat.recipe(Path("base"), Path("train.jsonl"), dataset=dataset)
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        return "recipe.yaml"

    return written


def checks(found: Any, state: str | None = None) -> dict[str, Any]:
    return {check["name"]: check for check in found["checks"] if state in (None, check["state"])}


def plain(sample: Any) -> str:
    """A sample as text, what is trained in brackets."""
    return "".join(f"[{token['text']}]" if token["trained"] else token["text"] for token in sample["text"]).replace(
        "][", ""
    )


def test_rows_that_are_fine(write: Callable[..., str]) -> None:
    found = data(write(tiny_chat.chats(11), tiny_chat.chats(7, start=40)))
    assert found["ok"]
    assert not checks(found, "failed") | checks(found, "warning")
    assert (found["rows"], found["formats"], found["set"]) == (11, ["messages"], "train")
    assert [plain(sample) for sample in found["samples"]] == [
        "<bos>u:a?<eos><bos>a:[maybe<eos>]",
        "<bos>u:is it is it c!!!!?<eos><bos>a:[yes<eos>]",
        "<bos>u:is it is it f?<eos><bos>a:[maybe<eos>]",
        "<bos>u:is it k?<eos><bos>a:[maybe<eos>]",
    ]
    assert [sample["place"] for sample in found["samples"]] == [f"train.jsonl:{line}" for line in (1, 3, 6, 11)]
    assert found["trained_tokens"] == sum(len(row["messages"][1]["content"]) + 1 for row in tiny_chat.chats(11))
    again = data("recipe.yaml", rows=11)
    assert [sample["row"] for sample in again["samples"]] == list(range(11))
    assert data("recipe.yaml", rows=0)["samples"] == []


def test_a_stop_token_that_is_never_trained(
    write: Callable[..., str], tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    (tmp_path / "bad.jinja").write_text(
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    session = cli("data", write([chat("a"), chat("b")], chat_template="bad.jinja"))
    assert session.code == 1
    assert "train.jsonl:1: the stop token is never trained" in session.out
    assert "failed" in session.out
    assert "│ u:aa:yes" in session.out
    assert session.err.splitlines()[-1] == "error: `train`: checks failed: stop tokens"
    assert "Traceback" not in session.err
    found = data("recipe.yaml")
    assert not found["ok"]
    failed = checks(found, "failed")["stop tokens"]
    assert failed["places"] == tuple(f"train.jsonl:{line}: the stop token is never trained" for line in (1, 2))
    assert failed["text"] == "training refuses every row of `train`"
    assert "chat_template" in failed["hint"]
    (refused,) = found["samples"]
    assert (refused["place"], refused["problem"]) == ("train.jsonl:1", "the stop token is never trained")


def test_a_row_that_trains_nothing(write: Callable[..., str], cli: Callable[..., SimpleNamespace]) -> None:
    recipe = write([chat("a"), chat("b", train=False), chat("c")])
    found = data(recipe)
    failed = checks(found, "failed")["trained rows"]
    assert failed["places"] == ("train.jsonl:2: trains nothing",)
    assert failed["text"] == "training refuses 1 of 3 rows of `train`"
    assert [sample["place"] for sample in found["samples"]] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:2"]
    assert cli("data", recipe).code == 1
    assert cli("data", recipe, "dataset.on_bad_row=skip", "dataset.max_skipped=0.5").code == 0
    refused = data(write([{"prompt": "long" * 9, "completion": "x"}], max_length=20, chat_template="tokenizer"))
    assert checks(refused, "failed")["trained rows"]["text"] == "training refuses every row of `train`"
    refused = data(write([chat("a"), chat("long" * 9), chat("c")], max_length=20))
    assert "nothing to train is left" in checks(refused, "failed")["trained rows"]["places"][0]


def test_a_row_that_cannot_be_read(write: Callable[..., str]) -> None:
    found = data(write([chat("a"), {"messages": "x"}, chat("c")]))
    failed = checks(found, "failed")["usable rows"]
    assert failed["places"][0].startswith("train.jsonl:2: ")
    assert failed["text"] == "training refuses 1 of 3 rows of `train`"
    assert found["rows"] == 2


def test_a_template_that_is_not_the_tokenizers(write: Callable[..., str], tmp_path: Path) -> None:
    other = tiny_chat.TEMPLATE.replace("'<bos>' + m['role'][0]", "'<bos>' + m['role'][0] | upper")
    (tmp_path / "other.jinja").write_text(other.replace("<bos>a:", "<bos>A:"))
    found = data(write(tiny_chat.chats(5), chat_template="other.jinja"))
    warning = checks(found, "warning")["chat template"]
    assert warning["text"] == (
        "not the tokenizer's own: at character 5 of the text `U:a?<eos><bos>A:maybe<eo` "
        "instead of `u:a?<eos><bos>a:maybe<eo`"
    )
    assert warning["places"] == ("train.jsonl:1",)
    (tmp_path / "other.jinja").write_text(tiny_chat.TEMPLATE + "{# the same #}")
    same = checks(data("recipe.yaml"))["chat template"]
    assert (same["state"], "with the same result (5 rows compared)" in same["text"]) == ("ok", True)


def test_special_tokens_that_a_text_spells(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat("what is <eos>?"), chat("b"), chat("c", "it is <bos>!")]
    ok = checks(data(write(rows)))["special tokens in text"]
    assert (ok["state"], ok["places"]) == ("ok", ("train.jsonl:1", "train.jsonl:3"))
    kept = checks(data(write(rows, split_special_tokens=False)))["special tokens in text"]
    assert (kept["state"], kept["places"]) == ("warning", ("train.jsonl:1", "train.jsonl:3"))
    assert "special tokens in text" not in checks(data(write(rows[1:2], split_special_tokens=False)), "warning")
    write(rows)
    monkeypatch.setattr(Spelling, "in_rendering", lambda *arguments: [])  # an encoder that takes them as special
    failed = checks(data("recipe.yaml", rows=0), "failed")["special tokens in text"]
    assert failed["places"] == ("train.jsonl:1", "train.jsonl:3")


def test_a_stop_token_that_others_would_not_stop_at(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "end.jinja").write_text(tiny_chat.TEMPLATE.replace("<eos>", "<end>"))
    recipe = write(tiny_chat.chats(5), special="<end>", chat_template="end.jinja")
    warning = checks(data(recipe), "warning")["generation"]
    assert "`<end>`" in warning["text"]
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tiny_chat.tiny.VOCAB]}))
    assert checks(data(recipe))["generation"]["state"] == "ok"


def test_rows_to_evaluate_on_that_are_trained(write: Callable[..., str]) -> None:
    recipe = write([chat("a"), chat("b"), chat("a")], [chat("c"), chat("b")])
    found = data(recipe)
    assert checks(found, "warning")["leaks"]["places"] == ("held.jsonl:2 = train.jsonl:2",)
    assert checks(found, "warning")["duplicates"]["places"] == ("train.jsonl:3",)
    held = data(recipe, set="eval")
    assert held["rows"] == 2
    assert checks(held, "warning").keys() == {"leaks"}
    split = data(write([chat(letter) for letter in "abcdef"] * 2, eval={"split": 0.4}))
    assert checks(split, "warning")["leaks"]["places"][0].startswith("train.jsonl:")


def test_sets_have_names(write: Callable[..., str], cli: Callable[..., SimpleNamespace]) -> None:
    rows = [chat("c"), chat("d")]
    recipe = write([chat("a")], rows, eval={"easy": "held.jsonl", "hard": "train.jsonl"})
    assert data(recipe, set="easy")["rows"] == 2
    assert len([check for check in data(recipe)["checks"] if check["name"] == "leaks"]) == 1  # the one that is wrong
    session = cli("data", recipe, "--set", "esay")
    assert session.code == 1
    assert session.err.splitlines() == [
        "error: `--set esay`: the recipe has no rows of that name",
        "  hint: did you mean `easy`?",
    ]


def test_characters_that_the_tokenizer_does_not_know(write: Callable[..., str]) -> None:
    found = data(write([chat("a"), chat("b", "é")]))
    assert checks(found, "warning")["unknown characters"]["places"] == ("train.jsonl:2",)


def test_data_that_is_not_there_is_an_error(write: Callable[..., str], cli: Callable[..., SimpleNamespace]) -> None:
    session = cli("data", write([chat("a")]), "dataset.train=nowhere.jsonl")
    assert (session.code, session.out) == (1, "")
    assert session.err.startswith("error: nowhere.jsonl: no such file")
    # another set that is not there does not keep from looking at this one
    session = cli("data", "recipe.yaml", "dataset.eval=nowhere.jsonl")
    assert session.code == 1
    assert "train.jsonl:1" in session.out
    assert "training refuses every row of `eval`\n" in session.out
    assert "nowhere.jsonl: no such file" in session.out
    assert cli("data", "recipe.yaml", "dataset.eval=nowhere.jsonl", "--set", "eval").out == ""


def test_the_page(write: Callable[..., str], cli: Callable[..., SimpleNamespace]) -> None:
    """The plain page as it was when last looked at; UPDATE_SESSIONS=1 writes it anew."""
    rows = [*tiny_chat.chats(11), chat("ring \x07 and\n\n\ttab", "no \x1b[31m\nmore")]
    session = cli("data", write(rows, [tiny_chat.chats(2)[1]], max_length=34))
    assert session.code == 0
    if os.environ.get("UPDATE_SESSIONS"):
        PAGE.write_text(session.out, encoding="utf-8")
    assert session.out == PAGE.read_text(encoding="utf-8")


def test_json(write: Callable[..., str], cli: Callable[..., SimpleNamespace]) -> None:
    found = json.loads(cli("data", write(tiny_chat.chats(3)), "--json", "--rows", "1").out)
    assert found == json.loads(json.dumps(data("recipe.yaml", rows=1)))
    assert {check["state"] for check in found["checks"]} <= {"ok", "warning", "failed"}
    assert all(check.keys() == {"name", "state", "text", "hint", "places"} for check in found["checks"])
    (sample,) = found["samples"]
    assert sum(len(token["ids"]) for token in sample["text"]) == sample["tokens"]
    assert sum(len(token["ids"]) for token in sample["text"] if token["trained"]) == sample["trained"]


class Reader(HTMLParser):
    """Reads a page: what is opened is closed, and the tokens by whether they stand in what is marked as trained."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.tokens: list[list[Any]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag in self.VOID:
            return
        self.open.append((tag, dict(attrs)))
        if tag == "span" and "title" in dict(attrs):
            self.tokens.append([dict(attrs)["title"], "", any(name == "mark" for name, _ in self.open)])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, said: str) -> None:
        if self.open and "title" in self.open[-1][1]:
            self.tokens[-1][1] += said


def test_html(write: Callable[..., str], cli: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"<mark>\" \u202e\x1b[31m"
    session = cli("data", write([chat(evil, evil), chat("b")]), "--html", "page.html", "--rows", "2")
    assert (session.code, session.err.splitlines()[-1]) == (0, "written: page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    samples = data("recipe.yaml", rows=2)["samples"]
    tokens = [token for sample in samples for token in sample["text"]]
    assert [token[0] for token in reader.tokens] == [" ".join(map(str, token["ids"])) for token in tokens]
    assert [token[2] for token in reader.tokens] == [token["trained"] for token in tokens]
    assert "".join(token[1] for token in reader.tokens).count("<script>alert('x')</script>") == 2
    for check in data("recipe.yaml")["checks"]:
        assert check["name"] in page


def test_rows_of_another_task_are_shown_as_it_trains_them(base: Path, tmp_path: Path):
    pair = {"prompt": "1+1? ", "chosen": "two", "rejected": "three"}
    rows = tiny_chat.write_rows(tmp_path / "pairs.jsonl", [pair, {**pair, "prompt": "2? "}])
    recipe = tiny_chat.recipe(base, rows, trainer={"task": "dpo"})
    found = data(recipe, rows=1)
    assert (found["task"], found["formats"], found["ok"]) == ("dpo", ["preference"], True)
    [sample] = found["samples"]
    said = "".join(token["text"] for token in sample["text"])
    assert said == "1+1? two<eos>1+1? three<eos>"
    assert "".join(token["text"] for token in sample["text"] if token["trained"]) == "two<eos>three<eos>"
    assert "packed" not in found["padding"]
