"""Entities that a model finds among words: right where type, first word and last word all are.

Their words are marked as in CoNLL's tasks (Tjong Kim Sang & De Meulder 2003): `B-PER` begins an entity of the type
`PER`, `I-PER` goes on with it, everything without such a mark is outside. As in their script, an `I-` that follows
another type or the outside begins an entity, so `I-PER I-PER` is one in IOB1 and IOB2 alike; `E-`, `L-`, `S-` and `U-`
of the schemes BIOES and BILOU end one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from peftctl.evaluation.metric import Array, Metric, Seen

BEGIN, END = "BSU", "ELSU"
"""Marks of the first and of the last word."""

UNMARKED = "no tag marks an entity, as `B-PER` begins one and `I-PER` goes on with it"

Entity = tuple[int, int, str]
"""First word, the word behind the last one, type."""


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities among the words of a row."""
    found: set[Entity] = set()
    begun, kind, ended = 0, "", True
    for index, tag in enumerate([*tags, ""]):
        mark, dash, name = tag.partition("-")
        inside = bool(dash) and mark in ("I", *BEGIN, *END)
        if kind and (not inside or ended or mark in BEGIN or name != kind):
            found.add((begun, index, kind))
            kind = ""
        if inside and not kind:
            begun, kind = index, name
        ended = mark in END
    return found


def counts(seen: Seen) -> Array:
    """(right, found, true) entities of each row [n, 3]."""
    rows = [(entities(found), entities(tags)) for found, tags in zip(seen.found, seen.tags, strict=True)]
    return np.array([(len(one & other), len(one), len(other)) for one, other in rows], dtype=np.float64).reshape(-1, 3)


def share(of: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    """Right entities by `of(found, true)`; 0 where there are others but none that counts, nan where there is none."""

    def figure(sums: Array) -> Array:
        right, found, true = (sums[..., i] for i in range(3))
        whole = of(found, true)
        with np.errstate(invalid="ignore"):
            return np.where(found + true > 0, right / np.maximum(whole, 1), np.nan)

    return figure


entity_f1 = Metric(
    name="entity_f1",
    about="F1 of entities, all types together: 2 right / (found + true)",
    needs="tags",
    better="higher",
    statistics=counts,
    figure=share(lambda found, true: (found + true) / 2),
    percent=True,
    absent=UNMARKED,
)

entity_precision = Metric(
    name="entity_precision",
    about="share of the entities found that are right",
    needs="tags",
    better="higher",
    statistics=counts,
    figure=share(lambda found, true: found),
    percent=True,
    absent=UNMARKED,
)

entity_recall = Metric(
    name="entity_recall",
    about="share of the true entities that are found",
    needs="tags",
    better="higher",
    statistics=counts,
    figure=share(lambda found, true: true),
    percent=True,
    absent=UNMARKED,
)
