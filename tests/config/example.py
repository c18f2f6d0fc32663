"""A recipe of no program: every kind of field that blocks may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import BeforeValidator, PlainValidator, TypeAdapter, WithJsonSchema, WrapValidator

from peftctl.config.block import Block, Count, Fraction, Natural, Positive, Probability
from peftctl.config.check import validate


@dataclass(frozen=True, kw_only=True)
class Engine(Block):
    """What drives the ship."""

    power: Positive = 300
    """Power, in kilowatts."""
    cylinders: Count = 6
    """Cylinders,
    all together."""
    idle: Probability = 0.0

    kind_of: ClassVar[str] = "engine"
    """No field."""


@dataclass(frozen=True, kw_only=True)
class Diesel(Engine):
    turbo: bool = False
    """Whether it has a turbocharger."""
    marks: dict[str, Count] = field(default_factory=dict)
    """Marks by name."""

    def __post_init__(self) -> None:
        if self.turbo and self.cylinders < 4:
            raise ValueError("`turbo` needs at least four `cylinders`; hint: set `cylinders: 4`")


@dataclass(frozen=True, kw_only=True)
class Sail(Engine):
    area: Positive
    """Area, in square metres."""


ENGINES: dict[str, type[Engine]] = {"diesel": Diesel, "sail": Sail}


def pick(value: Any) -> Engine:
    """The engine of the class that `type` names."""
    if isinstance(value, Engine):
        return value
    if not isinstance(value, dict) or value.get("type") not in [*ENGINES]:
        raise ValueError("`type` must be `diesel` or `sail`")
    return validate(ENGINES[value["type"]], {key: item for key, item in value.items() if key != "type"})


def lax(value: Any) -> Engine:
    return TypeAdapter(Diesel).validate_python(value)


def wrapped(value: Any, handler: Any) -> Engine:
    return handler(value)


@dataclass(frozen=True, kw_only=True)
class Cargo(Block):
    path: str
    """Where it lies."""
    weight: Positive = 1.0
    """Weight, in tonnes."""


@dataclass(frozen=True, kw_only=True)
class Share(Block):
    share: Fraction
    """Part of the whole."""


@dataclass(frozen=True, kw_only=True)
class Ship(Block):
    """A ship."""

    name: str
    """What it is called."""
    engine: Annotated[Any, PlainValidator(pick), WithJsonSchema({"$ref": "#/$defs/engine"})] = field(
        default_factory=Diesel
    )
    """What drives it."""
    spare: Annotated[Engine, PlainValidator(lax)] | None = None
    boat: Annotated[Diesel, WrapValidator(wrapped)] = field(default_factory=Diesel)
    mast: Annotated[str, BeforeValidator(lambda value: value)] = "oak"
    flag: Literal["none", "red", "green"] = "none"
    """Its flag."""
    crew: Literal["auto"] | Count = "auto"
    """Sailors."""
    ports: str | list[str] | None = None
    """Where it calls."""
    cargo: str | Cargo | list[str | Cargo] | Share | None = None
    """What it carries."""
    decks: int | list[int] = 1
    size: tuple[float, float] = (10.0, 3.0)
    """Length and width, in metres."""
    stops: tuple[str, ...] = ()
    labels: list[str] = field(default_factory=list)
    """Labels."""
    watches: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["first"])
    lights: dict[Literal["port", "starboard"], str] = field(default_factory=dict)
    afloat: bool = True
    speed: float = 1e-4
    """Speed, in knots."""
    number: int = 0
    draught: Natural | None = None
    hold: Cargo | None = None
