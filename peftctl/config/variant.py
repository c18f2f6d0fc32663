"""A block whose `type` picks its class: `{type: lora, r: 8}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from peftctl.config.check import validate
from peftctl.config.schema import schema as schema_of
from peftctl.config.write import dump

T = TypeVar("T")


def read(value: Any, base: type[T], kinds: Mapping[str, type[T]], what: str, also: Iterable[str] = ()) -> T:
    """A mapping as the dataclass of `kinds` that its `type` names; its other keys are that class's fields.

    Args:
        base: what an instance already is.
        what: the name of such a block, for messages.
        also: other types that a person may write.

    Raises ValueError and pydantic.ValidationError, for a field's validator to let pass.
    """
    if isinstance(value, base):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping with `type` and the fields of that {what}")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        names = " or ".join(f"'{name}'" for name in sorted({*kinds, *also}))
        error: dict[str, Any] = {"type": "literal_error", "loc": ("type",), "input": kind, "ctx": {"expected": names}}
        if "type" not in value:
            error = {"type": "missing", "loc": ("type",), "input": value}
        raise ValidationError.from_exception_data(what, [error])  # type: ignore[list-item]
    return validate(kinds[kind], {key: item for key, item in value.items() if key != "type"})


def plain(block: Any, name: str) -> dict[str, Any]:
    """The block as `read` reads it back."""
    return {"type": name, **dump(block)}


def schema(kinds: Mapping[str, type[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """JSON Schemas of all `kinds`, and the definitions that they refer to."""
    variants, shared = [], dict[str, Any]()
    for name, cls in sorted(kinds.items()):
        variant = schema_of(cls, name)
        shared |= variant.pop("$defs", {})
        variant["properties"] = {"type": {"const": name}, **variant["properties"]}
        variant["required"] = ["type", *variant.get("required", [])]
        variants.append({key: value for key, value in variant.items() if not key.startswith("$")})
    return variants, shared
