"""The model card as a Markdown reader sees it: whatever a recipe says, it says inside its fence or as plain text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from peftctl.config.document import parse
from peftctl.config.write import to_yaml
from peftctl.exports.card import Facts, card
from peftctl.models.head import PICTURES, SEQ2SEQ, SEQUENCES, TOKENS

FACTS = Facts(
    base="HuggingFaceTB/SmolLM2-135M-Instruct",
    method="`lora`, r 16, alpha 32, on all-linear",
    recipe="model:\n  name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\noutput: runs/one\n",
    counts={"train": {"read": 12, "kept": 10, "truncated": 1, "split": 0, "dropped": 2, "skipped": 0}},
    figures={"base": {"loss": 2.5, "accuracy": 0.75}, "adapter": {"loss": 1.25, "accuracy": 0.9375}},
)
HOSTILE = {
    "fence": "```\n# Owned\n```",
    "longer fence": "``````\n# Owned\n``````",
    "tildes": "~~~\n# Owned\n~~~",
    "rule": "\n---\nlicense: mit\n---\n# Owned",
    "image": "![x](https://evil.example/x.png)",
    "html": "<img src=x onerror=alert(1)>",
    "link": "[click](https://evil.example)",
    "bar": "a | b | c",
}


def split(text: str) -> tuple[dict[str, object], str]:
    """The front matter, and what is after it."""
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def tokens(body: str) -> list[Token]:
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [inner for token in found for inner in (token, *(token.children or []))]


def headings(body: str) -> list[str]:
    parsed = MarkdownIt("commonmark").enable("table").parse(body)
    return [after.content for before, after in pairwise(parsed) if before.type == "heading_open"]


def assert_tame(text: str, like: Facts) -> None:
    """The same front matter, headings and fences as the card of `like`, and nothing that a reader would load."""
    front, body = split(text)
    wanted, plain = split(card(like))
    assert front["pipeline_tag"] == wanted["pipeline_tag"]
    assert front.keys() <= {"base_model", "library_name", "pipeline_tag", "tags"}
    assert front["library_name"] == wanted["library_name"]
    assert [h for h in headings(body) if not h.startswith("Adapter of")] == headings(plain)[1:]
    kinds = [token.type for token in tokens(body)]
    assert kinds.count("fence") == [token.type for token in tokens(plain)].count("fence")
    assert not {"image", "html_inline", "html_block", "link_open", "hr"} & set(kinds)


@pytest.mark.parametrize("merged", [False, True])
def test_what_it_tells(merged: bool) -> None:
    front, body = split(card(replace(FACTS, merged=merged)))
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["peftctl"],
    }
    for told in ("`HuggingFaceTB/SmolLM2-135M-Instruct`", "r 16, alpha 32", "0.9375", "runs/one"):
        assert told in body
    cells = [token.content for token in tokens(body) if token.type == "inline"]
    assert cells[cells.index("train") :][:7] == ["train", "12", "10", "1", "0", "2", "0"]
    code = next(token for token in tokens(body) if token.type == "fence" and token.info == "python")
    compile(code.content, "card", "exec")
    assert ("PeftModel" in code.content) is not merged


HEADS = {
    "text2text-generation": SEQ2SEQ,
    "text-classification": SEQUENCES.with_labels(("no", "yes", "so so")),
    "token-classification": TOKENS.with_labels(("O", "B-PER")),
    "image-text-to-text": PICTURES,
}


@pytest.mark.parametrize("tag", HEADS)
@pytest.mark.parametrize("merged", [False, True])
def test_what_it_tells_of_other_models(tag: str, merged: bool) -> None:
    head = HEADS[tag]
    front, body = split(card(replace(FACTS, merged=merged, head=head)))
    assert front["pipeline_tag"] == tag
    assert front["library_name"] == ("transformers" if merged else "peft")
    assert f"{head.auto}.from_pretrained(" in body
    assert "vllm" not in body
    assert (f", num_labels={len(head.labels)})" in body) is bool(head.labels and not merged)
    assert ("Classes, in the order of the logits: `no`, `yes`, `so so`." in body) is ("so so" in head.labels)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_label_is_plain_text(what: str) -> None:
    head = SEQUENCES.with_labels((HOSTILE[what], "fine"))
    assert_tame(card(replace(FACTS, head=head)), replace(FACTS, head=HEADS["text-classification"]))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_recipe_stays_in_its_fence(what: str) -> None:
    recipe = to_yaml({"model": {"name_or_path": f"org/{HOSTILE[what]}"}, "output": HOSTILE[what], HOSTILE[what]: 1})
    text = card(replace(FACTS, recipe=recipe))
    assert_tame(text, FACTS)
    fence = [token for token in tokens(split(text)[1]) if token.type == "fence"][-1]
    assert parse(fence.content, "card").data == parse(recipe, "recipe").data


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_target_is_plain_text(what: str) -> None:
    assert_tame(card(replace(FACTS, method=f"`lora`, r 16, on {HOSTILE[what]}")), FACTS)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_name_is_plain_text(what: str) -> None:
    assert_tame(card(replace(FACTS, base=HOSTILE[what])), FACTS)
    assert_tame(card(replace(FACTS, base=f"/models/{HOSTILE[what]}")), FACTS)
    figures = {HOSTILE[what]: {"loss": 1.5}}
    assert_tame(card(replace(FACTS, figures=figures, counts={HOSTILE[what]: FACTS.counts["train"]})), FACTS)


@pytest.mark.parametrize("what", ['x") or exit("', "x'''\"\"\"", "a\\", "a\nexit()"])
def test_the_example_stays_one_expression(what: str) -> None:
    body = split(card(replace(FACTS, base=f"/models/{what}")))[1]
    code = next(token for token in tokens(body) if token.type == "fence" and token.info == "python")
    compile(code.content, "card", "exec")
    assert len(code.content.strip().splitlines()) == 4
    assert not any(word in code.content for word in ('") or exit("', "\nexit()"))


FOLDERS = {
    "plain": ("/home/ann/models/llama", "llama"),
    "quoted": ("'/home/ann/my models/llama'", "llama"),
    "double": ('"/home/ann/models/llama"', "llama"),
    "closed": ("/home/ann/models/llama/", "llama"),
    "home": ("~/ann/models/llama", "llama"),
    "shallow": ("/ann", "ann"),
    "drive": ("C:\\Users\\ann\\llama", "llama"),
    "in a list": ("[/home/ann/a.jsonl, /home/ann/b.jsonl]", "b.jsonl"),
}


@pytest.mark.parametrize("how", FOLDERS)
def test_no_folder_of_somebodys_machine(how: str) -> None:
    path, kept = FOLDERS[how]
    base = "/home/ann/llama" if path.startswith("[") else path.strip("'\"")
    text = card(replace(FACTS, base=base, recipe=f"model:\n  name_or_path: {path}\noutput: runs/one\n"))
    assert kept in text
    assert not any(folder in text for folder in ("/home", "ann/", "\\ann", "Users", "my models"))
    assert "output: runs/one" in text
    assert "base_model" not in split(text)[0]
