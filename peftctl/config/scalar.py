"""What an unquoted YAML scalar means: the core schema of YAML 1.2.

`2e-4` is a number; `no`, `on`, `1:30` and `2024-01-01` are texts; `010` is ten.
"""

from __future__ import annotations

import re
from math import isfinite

Scalar = str | int | float | bool | None

CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
DECIMAL = re.compile(r"[-+]?[0-9]+")
PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

LONGEST_PREFIXED = 200
"""Characters of an octal or hexadecimal number: fewer than a float's range holds."""


def plain(text: str) -> Scalar:
    """What `text` means without quotes. A number beyond the range of floats, such as the commit `12e4567`, is text."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if PREFIXED.fullmatch(text) and len(text) <= LONGEST_PREFIXED:
        return int(text, 0)
    if not FLOAT.fullmatch(text) or not isfinite(float(text)):
        return text
    return int(text) if DECIMAL.fullmatch(text) else float(text)


def finite(text: str) -> bool:
    """Whether `text` is not one of YAML's infinities and NaNs."""
    return NOT_FINITE.fullmatch(text) is None


def forbidden(text: str) -> str | None:
    """The first character of `text` that no file name and no UTF-8 file can hold: NUL, or half a surrogate pair."""
    return next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
