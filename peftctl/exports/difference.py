"""Which tensors of a merged model differ from the base it was merged into, read back from the disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from peftctl.errors import Problem, StorageError
from peftctl.exports.plan import Part
from peftctl.exports.weights import Weights


class Difference(NamedTuple):
    """What became of the tensors that a merge was to change."""

    changed: dict[str, float | None]
    """Name -> norm of the change relative to the norm of what was there; None where that was zero."""

    unchanged: list[str]
    """Adapted, yet the same: an update of zero, or one too small for the dtype."""


def compare(parts: list[Part], base: Weights, merged: Weights, poll: Callable[[], None]) -> Difference:
    """Compare the merged files with what was merged into, one tensor at a time.

    Raises StorageError when a tensor that no adapter touches is not the same bit for bit, or one is missing.
    """
    expected = {part.name for part in parts}
    problems = [Problem(f"{merged.place}: `{name}` is missing") for name in sorted(expected - merged.stored.keys())]
    problems += [Problem(f"{merged.place}: `{name}` is not of it") for name in sorted(merged.stored.keys() - expected)]
    if problems:
        raise StorageError.of(problems)
    changed: dict[str, float | None] = {}
    unchanged: list[str] = []
    for part in parts:
        poll()
        old, new = part.before(base), merged.read(part.name)
        same = old.dtype == new.dtype and torch.equal(bits(old), bits(new))
        if same and part.changes:
            unchanged.append(part.name)
        elif not same and not part.changes:
            problems.append(Problem(f"{merged.place}: `{part.name}` changed though no adapter touches it"))
        elif not same:
            norm = float(torch.linalg.vector_norm(old.float()))
            change = float(torch.linalg.vector_norm(new.float() - old.float()))
            changed[part.name] = change / norm if norm else None
    if problems:
        raise StorageError.of(problems)
    return Difference(changed, unchanged)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, which are equal where its NaNs are, too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
