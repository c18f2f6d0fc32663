"""What `peftctl data` shows to a person: rows token by token, figures of all of them, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from peftctl.cli.console import clean, folded, one_line
from peftctl.cli.layout import aligned

STATES = {"ok": "green", "warning": "bold yellow", "failed": "bold red"}
BAR = 32
"""Columns of the longest bar of the histogram."""

NARROW = 32
"""Columns that what was found gets at least beside its label."""

RUN, ENDS = 160, 60
"""Tokens from which a run of trained or of masked ones is not shown whole, and how many are shown of its ends."""

MOST = 600
"""Tokens that are shown of a row."""


class Signs(NamedTuple):
    """Characters that a terminal may lack."""

    opens: str
    closes: str
    newline: str
    tab: str
    bar: str
    gutter: str
    more: str


SIGNS = Signs("⟦", "⟧", "↵", "⇥", "█", "│", "…")
ASCII = Signs("[[", "]]", "\\n", "\\t", "#", "|", "...")


def page(found: Mapping[str, Any], console: Console) -> Iterator[Text]:
    """The whole page, line by line, none wider than a terminal."""
    signs = ASCII if console.options.ascii_only else SIGNS
    width = console.width if console.is_terminal else None
    yield from labelled(facts(found), width)
    if found["lengths"]:
        yield Text()
        yield from histogram(found["lengths"]["histogram"], signs, width)
    if found["samples"] and not found["labels"]:
        yield Text()
        yield folded(legend(signs), width) if width else legend(signs)
    for sample in found["samples"]:
        yield Text()
        yield from row(sample, signs, width)
    yield Text()
    yield from checks(found["checks"], width)


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The account of the rows, and how they were prepared."""
    ledger, lengths, padding = found["ledger"], found["lengths"], found["padding"]
    told = [("set", found["set"]), ("model", found["model"])]
    if not found["rows"]:
        return [*told, ("rows", "none can be used")]
    part = f"{found['trained_tokens']:,} trained ({trained_share(found)})"
    packed = f"; {percent(padding['packed'])} when rows are packed" if "packed" in padding else ""
    if found["task"] != "sft":
        told.append(("task", found["task"]))
    told += [
        ("rows", account(ledger)),
        ("form", ", ".join(found["formats"])),
        ("tokens", f"{found['tokens']:,}" + (f", of which {part}" if found["trained_tokens"] else "")),
        ("lengths", "{min:,} to {max:,} tokens, median {median:,}, 95 % up to {p95:,}".format(**lengths)),
        ("max_length", f"{lengths['max_length']:,}, reached by {lengths['at_max_length']:,}"),
        ("padding", f"{percent(padding['padded'])} of a batch{packed}"),
    ]
    if found["chat_template"] is not None:
        own = found["chat_template"] == "tokenizer"
        told.append(("chat template", "the tokenizer's own" if own else found["chat_template"]))
        trains = found["train_on"]
        told.append(("trains on", trains if isinstance(trains, str) else ", ".join(trains)))
    if found["labels"]:
        told.append(("labels", ", ".join(map(one_line, found["labels"]))))
    else:
        told.append(("stop tokens", ", ".join(f"{token['text']} ({token['id']})" for token in found["stop_tokens"])))
    told.append(("pad token", "{text} ({id})".format(**found["pad_token"])))
    return told


def account(ledger: Mapping[str, Any]) -> str:
    """`100 read, 98 kept, 2 skipped`."""
    named = ("truncated", "split", "dropped", "skipped")
    parts = [f"{ledger['read']:,} read", f"{ledger['kept']:,} kept"]
    parts += [f"{ledger[name]:,} {name}" for name in named if ledger.get(name)]
    cut = ledger.get("tokens_cut")
    lost = f"; {cut:,} token{'s' * (cut != 1)} lost" if cut else ""
    return ", ".join(parts) + lost


def trained_share(figures: Mapping[str, Any]) -> str:
    """The share of tokens that are trained, of a set or of a sample."""
    key = "trained_tokens" if "trained_tokens" in figures else "trained"
    return percent(figures[key] / max(figures["tokens"], 1))


def percent(share: float) -> str:
    """`12 %`, `0.3 %`."""
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def histogram(bars: Sequence[Mapping[str, Any]], signs: Signs, width: int | None) -> Iterator[Text]:
    """How many rows have how many tokens."""
    most = max(bar["rows"] for bar in bars)
    spans = [f"{bar['from']:,}-{bar['to']:,}" for bar in bars]
    around = max(map(len, spans)) + len(f"{most:,}") + 5
    longest = min(BAR, max(width - around, 4)) if width else BAR
    for bar, span in zip(bars, spans, strict=True):
        filled = signs.bar * -(-bar["rows"] * longest // most)
        line = Text.assemble(f"  {span:>{max(map(len, spans))}}  ", (filled, "cyan"))
        yield line.append(f" {bar['rows']:,}" if bar["rows"] else "", "dim")


def legend(signs: Signs) -> Text:
    """How trained and masked tokens are told apart."""
    marked = Text.assemble((f"{signs.opens}trained{signs.closes}", "bold green underline"), "  ", ("masked", "dim"))
    marked.append("  ").append("<special>", "cyan")
    return marked.append(f"  {signs.newline} line break  {signs.tab} tab", "dim")


def row(sample: Mapping[str, Any], signs: Signs, width: int | None) -> Iterator[Text]:
    """One row: where it is from, and its tokens."""
    head = Text.assemble((one_line(sample["place"]), "bold"))
    marked = any(token["trained"] for token in sample["text"])
    trained = f", {sample['trained']:,} trained ({trained_share(sample)})" if marked or sample["problem"] else ""
    figures = f"{sample['tokens']:,} tokens{trained}"
    notes = [sample["why"], figures, f"{sample['cut']:,} cut off" if sample["cut"] else ""]
    head.append("".join(f"  {note}" for note in notes if note), "dim")
    yield folded(head, width) if width else head
    if sample["problem"]:
        yield Text.assemble("  ", (one_line(sample["problem"]), STATES["failed"]))
    gutter = (f"  {signs.gutter} ", "dim")
    for line in lines(shortened(sample["text"], signs), signs):
        for part in cut_to(line, width and max(width - cell_len(gutter[0]), 8)):
            yield Text.assemble(gutter, part)


def shortened(tokens: Sequence[Mapping[str, Any]], signs: Signs) -> list[Mapping[str, Any]]:
    """The tokens without the middle of long runs of one kind, and of the row when it is still long."""
    kept: list[Mapping[str, Any]] = []
    for _, group in groupby(tokens, key=lambda token: token["trained"]):
        kept += _ends(list(group), RUN, ENDS, signs)
    return _ends(kept, MOST, MOST // 2, signs)


def _ends(tokens: list[Mapping[str, Any]], most: int, ends: int, signs: Signs) -> list[Mapping[str, Any]]:
    if len(tokens) <= most:
        return tokens
    out = len(tokens) - 2 * ends
    gap = {"text": f" {signs.more} {out:,} more {signs.more} ", "trained": tokens[0]["trained"], "gap": True}
    return [*tokens[:ends], gap, *tokens[-ends:]]


def lines(tokens: Sequence[Mapping[str, Any]], signs: Signs) -> Iterator[Text]:
    """The text of tokens, broken where it has line breaks; neighbours differ in shade, what is trained is bracketed."""
    line, was_trained = Text(), False
    for number, token in enumerate(tokens):
        if token["trained"] != was_trained:
            line.append(signs.closes if was_trained else signs.opens, "bold green")
            was_trained = token["trained"]
        parts = clean(token["text"]).replace("\t", signs.tab).split("\n")
        for part in parts[:-1]:
            line.append(part, style(token, number)).append(signs.newline, style(token, number))
            yield line
            line = Text()
        line.append(parts[-1], style(token, number))
    if was_trained:
        line.append(signs.closes, "bold green")
    if line:
        yield line


def style(token: Mapping[str, Any], number: int) -> str:
    """How a token looks: trained, masked or special, every other one in another shade."""
    if token.get("gap"):
        return "italic dim"
    if token["trained"]:
        return f"{'bold ' if token['special'] else ''}{('green', 'bright_green')[number % 2]} underline"
    return "cyan" if token["special"] else ("dim", "bright_black")[number % 2]


def cut_to(line: Text, width: int | None) -> Iterator[Text]:
    """A line in parts that fit, cut anywhere: space at the end of a part is part of the text."""
    breaks, column = [], 0
    for place, character in enumerate(line.plain):
        column += cell_len(character)
        if width and column > width:
            breaks.append(place)
            column = cell_len(character)
    yield from line.divide(breaks)


def checks(found: Sequence[Mapping[str, Any]], width: int | None) -> Iterator[Text]:
    """What was looked for: what is wrong comes last, where it is read first."""
    order = list(STATES)
    names = max(len(check["name"]) for check in found)
    states = max(map(len, STATES))
    for check in sorted(found, key=lambda check: order.index(check["state"])):
        label = f"{check['state']:<{states}}  {check['name']:<{names}}"
        told = [check["text"], *check["places"], *([f"hint: {check['hint']}"] if check["hint"] else [])]
        if width and width - len(label) < NARROW:  # then the text goes below
            yield _state((label, ""), check["state"])
            label = ""
        for pair in aligned([(label, told[0]), *(("", text) for text in told[1:])], width):
            yield _state(pair, check["state"])


def _state(pair: tuple[str, str], state: str) -> Text:
    label, text = pair
    line = Text(label)
    if label.strip():
        line.stylize(STATES[state], 0, len(state))
    body = Text(text)
    body.highlight_regex(r"`[^`\n]+`", "bold")
    body.highlight_regex(r"^hint:", "bold cyan")
    return line.append(body)


def labelled(rows: Sequence[tuple[str, str]], width: int | None) -> Iterator[Text]:
    """Labels and values."""
    for label, value in aligned(rows, width):
        yield Text.assemble((label, "bold"), value)
