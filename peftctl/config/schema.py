"""JSON Schema (draft 2020-12) of a block, for editors: what may be typed, and what it means."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import TypeAdapter, WithJsonSchema

from peftctl.config.annotation import bare, hints, is_block, is_list, keys, members, metadata, nullable
from peftctl.config.fields import Field, fields

DRAFT = "https://json-schema.org/draft/2020-12/schema"

SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}

LIMITS = {
    Ge: ("ge", "minimum"),
    Gt: ("gt", "exclusiveMinimum"),
    Le: ("le", "maximum"),
    Lt: ("lt", "exclusiveMaximum"),
    MinLen: ("min_length", "min{}"),
    MaxLen: ("max_length", "max{}"),
}


def schema(cls: type, title: str) -> dict[str, Any]:
    """The JSON Schema of the dataclass `cls`, the blocks in it under `$defs`, named as their classes.

    A field whose annotation carries `pydantic.WithJsonSchema` has that schema as it stands; a `$ref` in it may point
    to a definition that the caller adds.
    """
    definitions: dict[str, Any] = {}
    whole = {"$schema": DRAFT, "title": title, **_block(cls, definitions)}
    return {**whole, "$defs": definitions} if definitions else whole


def _block(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object"}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # what @dataclass writes itself
        found["description"] = " ".join(cls.__doc__.split())
    found["properties"] = {field.name: _field(field, hints(cls)[field.name], definitions) for field in fields(cls)}
    if required := [field.name for field in fields(cls) if field.required]:
        found["required"] = required
    return {**found, "additionalProperties": False}


def _field(field: Field, annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    found = _any_of(annotation, definitions)
    if field.doc:
        found["description"] = field.doc
    if not field.required and "$ref" not in found:
        found["default"] = field.default
    return found


def _any_of(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    options = [_one(member, definitions) for member in members(annotation)]
    if nullable(annotation):
        options.append({"type": "null"})
    return options[0] if len(options) == 1 else {"anyOf": options}


def _one(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    own, base, arguments = metadata(annotation), bare(annotation), get_args(bare(annotation))
    for extra in own:
        if isinstance(extra, WithJsonSchema):
            return deepcopy(extra.json_schema or {})
    if base in SCALARS:
        return {"type": SCALARS[base], **_limits(own, "Length")}
    if get_origin(base) is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if is_block(base):
        return {"$ref": f"#/$defs/{_define(base, definitions)}"}
    if get_origin(base) is dict:
        names = {"propertyNames": {"enum": known}} if (known := keys([annotation])) else {}
        return {"type": "object", **names, "additionalProperties": _any_of(arguments[1], definitions)}
    if get_origin(base) is tuple and Ellipsis not in arguments:
        items = [_any_of(item, definitions) for item in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if is_list(base):
        return {
            "type": "array",
            **_limits(own, "Items"),
            **({"items": _any_of(arguments[0], definitions)} if arguments else {}),
        }
    return TypeAdapter(annotation).json_schema()


def _define(cls: type, definitions: dict[str, Any]) -> str:
    """The name of the definition of `cls`, which is written when it is first asked for."""
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}  # a block within itself finds it here
        definitions[cls.__name__] = _block(cls, definitions)
    return cls.__name__


def _limits(own: list[Any], unit: str) -> dict[str, Any]:
    """The keywords for limits of a number, or of the length of a text or a list."""
    found: dict[str, Any] = {}
    for limit in own:
        for kind, (attribute, keyword) in LIMITS.items():
            if isinstance(limit, kind):
                found[keyword.format(unit)] = getattr(limit, attribute)
    return found
