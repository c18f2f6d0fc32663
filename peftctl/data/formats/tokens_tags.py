"""`{"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}`: words, and the class of each as a text or a whole number.

The tags may be called `ner_tags`, or `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, kind
from peftctl.data.formats.kinds import Tagged
from peftctl.errors import Problem

NAMES = ("tags", "ner_tags", "labels")
"""What tags are called."""


def read(row: Row, problems: Problems) -> Tagged:
    given = [key for key in NAMES if row.value.get(key) is not None]
    if len(given) != 1:
        what = f"both `{given[0]}` and `{given[1]}`" if given else "`tags` is missing"
        hint = "`columns: {tags: pos_tags}` takes the tags from another key"
        problems.append(Problem(f"{row.place}: {what}", None if given else hint))
    tokens = _listed(row, "tokens", problems, (str,), ("a list of texts", "a text"))
    wanted = ("a list of texts or of whole numbers", "a text or a whole number")
    tags = _listed(row, given[0], problems, (str, int), wanted) if given else []
    if not problems and len(tokens) != len(tags):
        problems.append(Problem(f"{row.place}: {len(tokens)} tokens have {len(tags)} tags", "each token has one"))
    return Tagged(row.place, tokens, tags)


def _listed(row: Row, key: str, problems: Problems, types: tuple[type, ...], words: tuple[str, str]) -> list[Any]:
    """The list under `key`, whose items are of `types`; a problem where it is none. `words` say what both are."""
    found = row.value[key]
    if not isinstance(found, list):
        problems.append(Problem(f"{row.place}: {key}: expected {words[0]}; got {kind(found)}"))
        return []
    if not found:
        problems.append(Problem(f"{row.place}: {key}: is empty"))
    for number, item in enumerate(found):
        if isinstance(item, bool) or not isinstance(item, types):
            problems.append(Problem(f"{row.place}: {key}[{number}]: expected {words[1]}; got {kind(item)}"))
        elif isinstance(item, str) and not item.strip():
            problems.append(Problem(f"{row.place}: {key}[{number}]: is empty"))
    return found


def _fits(value: Mapping[str, Any]) -> bool:
    return any(value.get(key) is not None for key in NAMES)


TOKENS_TAGS = Form(name="tokens_tags", required=("tokens",), optional=NAMES, read=read, fits=_fits)
