"""What somebody who mistyped a name probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 100
"""Characters of a name that are compared; difflib's time grows with their square."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """A hint "did you mean `x`?", when a candidate is near enough to `name`; case and `-` against `_` count little."""
    alike = {_bare(candidate): candidate for candidate in candidates}
    near = get_close_matches(_bare(name), alike, n=1, cutoff=0.6)
    return f"did you mean `{alike[near[0]]}`?" if near else None


def _bare(name: str) -> str:
    return name[:LONGEST].casefold().replace("-", "_")
