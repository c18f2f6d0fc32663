"""What a block of a recipe is made of: a frozen dataclass whose fields carry their ranges and their docstrings.

A block is plain Python: pydantic reads `__pydantic_config__` and the annotations only where a recipe is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1)]
"""A whole number of at least one."""

Natural = Annotated[int, Ge(0)]
"""A whole number of at least zero."""

Seed = Annotated[int, Ge(0), Le(2**63)]
"""What torch's generators can be seeded with."""

Positive = Annotated[float, Gt(0)]
"""A number above zero."""

NonNegative = Annotated[float, Ge(0)]
"""A number of at least zero."""

Fraction = Annotated[float, Ge(0), Le(1)]
"""A number from zero to one."""

Probability = Annotated[float, Ge(0), Lt(1)]
"""A number from zero up to, but not including, one: a dropout rate."""

LOCATED = "a path from the folder of the recipe"
"""What the annotation of a field, or of its items, carries when recipes write paths there."""

Located = Annotated[str, LOCATED]
"""A path, seen from the recipe's folder; what is no path of something there may be a hub id."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Base of every recipe block. A key that is no field of it is a mistake, never ignored."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
