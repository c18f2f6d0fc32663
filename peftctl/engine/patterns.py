"""Values by module, as HF PEFT's `rank_pattern` has them, and which of a stranger's patterns are safe to run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from peftctl.errors import AdapterError

TOKEN = re.compile(
    r"""(?P<atom>\\[.\-_dDwWsS] | \[[\w.\-]+\] | [\w.\-]) | (?P<open>\((?:\?:)?) | (?P<close>\)) | (?P<bar>\|)
    | (?P<many>[*+] | \{\d{1,3}(?:,\d{0,3})?\}) | (?P<maybe>\?) | (?P<anchor>[\^$])""",
    re.VERBOSE,
)
"""What a stranger's pattern may consist of."""

STEPS = 100_000_000
"""Bound on the comparisons that one mapping of patterns may take; in practice some tenths of a second."""

WAYS = 4096
"""Ways through the alternatives of one pattern, `(q|k|v)_proj` having three."""


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the module `name`, by HF PEFT's rule for rank_pattern.

    A pattern is a regular expression over the last dotted parts of the name; a leading `^` asks for all of it.
    """
    return next((value for pattern, value in patterns.items() if compiled(pattern).match(name)), default)


@lru_cache(maxsize=8192)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression that `by_pattern` matches; kept, because `re` itself remembers only a few hundred."""
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise AdapterError(f"method: `{pattern}` is no regular expression: {error}") from None


def ways(pattern: str) -> tuple[int, int] | None:
    """(ways through the alternatives of `pattern`, atoms in it that repeat); None when it is not simple.

    A regular expression backtracks without end only through repeated groups, so that these are not simple.
    """
    product, many, before, stack, at = 1, 0, "", [1], 0
    while at < len(pattern):
        token = TOKEN.match(pattern, at)
        kind = str(token.lastgroup) if token else ""
        if token is None or (kind == "many" and before == "close") or (kind == "close" and len(stack) == 1):
            return None
        if kind == "open":
            stack.append(1)
        elif kind == "bar":
            stack[-1] += 1
        elif kind == "close":
            product *= stack.pop()
        product *= 2 if kind == "maybe" else 1
        many += kind == "many"
        before, at = kind, token.end()
    return (product * stack[0], many) if len(stack) == 1 and len(pattern) <= 256 else None


def steps(pattern: str, names: Iterable[str]) -> float:
    """A bound on the steps that matching `pattern` by HF PEFT's rule against all `names` takes."""
    simple = ways(pattern)
    if simple is None:
        return math.inf
    product, many = simple
    if many > 8 or product > WAYS:
        return math.inf
    return product * sum(math.comb(len(name) + many, many) * (name.count(".") + 1) for name in names)
