"""What merging does to every tensor of a base, known before any is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Adapter
from peftctl.engine.attach import adapters_of
from peftctl.errors import AdapterError, ModelError, NotMergeable, Problem
from peftctl.exports.skeleton import ends, keys, tensors, tied
from peftctl.exports.weights import Weights
from peftctl.models.head import CAUSAL, Head, atop

DType = Literal["auto", "float32", "bfloat16", "float16"]
Change = tuple[Adapter, str]
"""An adapter, and the name that a parameter has below its host."""


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model."""

    name: str
    """In the merged files: as in the base's, or the model's own for one that was tied."""

    key: str | None
    """In the base's files; None where they lack it, and the adapter brings all of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    changes: tuple[Change, ...] = ()
    """What changes it."""

    cast: bool = False
    """Whether `dtype` is another one than the file's."""

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def before(self, weights: Weights) -> Tensor:
        """What is merged into, in the dtype of the result. Raises ModelError when it does not fit that."""
        return self.fitted(self.stored(weights))

    def stored(self, weights: Weights) -> Tensor:
        """What the base has of it: zeros where it has nothing."""
        return torch.zeros(self.shape) if self.key is None else weights.read(self.key)

    def after(self, weights: Weights) -> Tensor:
        """The merged tensor: float32 arithmetic, rounded once."""
        value = self.stored(weights)
        if not self.changes:
            return self.fitted(value)
        value = value.float()
        for adapter, leaf in self.changes:
            value = adapter.merged(value, leaf)
        return self.fitted(value)

    def fitted(self, value: Tensor) -> Tensor:
        """`value` in the dtype of the result; a tensor that keeps its dtype is passed on bit for bit."""
        result = value.to(self.dtype)
        if (self.changes or self.cast) and not bool(torch.isfinite(result).all()):
            raise ModelError(
                f"`{self.name}`: not finite in {str(self.dtype).removeprefix('torch.')}",
                "merge into `bfloat16` or `float32`, which hold larger numbers than `float16`",
            )
        return result


@dataclass(frozen=True)
class Plan:
    """All tensors of the merged model, in the order of the base's files."""

    parts: list[Part]

    untied: bool
    """Whether embedding and output head stop sharing one weight."""

    left: tuple[str, ...] = ()
    """What of the base's files is no part of a classifier, and stays behind."""

    @classmethod
    def of(cls, model: nn.Module, weights: Weights, name: str, dtype: DType, head: Head = CAUSAL) -> Plan:
        """The plan for the adapter `name`, attached to the skeleton `model` with `head` of the files `weights`.

        Raises NotMergeable with all sites whose adapter is more than a change of weights, AdapterError when a change
        cannot be written into this model or a head is nowhere, ModelError when files and model do not fit.
        """
        changed, found = changes(model, name), keys(model, weights)
        if not changed:
            raise AdapterError("the adapter changes no weight of this model", "is it the right adapter?")
        new = brought(model, weights, changed, found) if head.classifies else {}
        found = {name: key for name, key in found.items() if name not in new}
        changed = {name: applied for name, applied in changed.items() if name not in new}
        touched = [group for group in tied(model) if group & changed.keys()]
        together = [group for group in touched if group & found.keys() and alike(group, changed)]
        unwritten = set().union(*together) - found.keys()  # the files have it under the name of another member
        changed = {name: applied for name, applied in changed.items() if name not in unwritten}
        groups = [group for group in touched if group not in together]
        refuse_inseparable(model, groups)
        origin = dict(found)
        for group in groups:
            present = next((found[member] for member in sorted(group) if member in found), None)
            origin |= {member: present for member in group if member not in found and present is not None}
        refuse_unfit(model, weights, changed, origin)
        by_key = {key: member for member, key in found.items()}

        def rounded(stored: torch.dtype) -> torch.dtype:
            return stored if dtype == "auto" or not stored.is_floating_point else getattr(torch, dtype)

        def part(name: str, key: str, member: str | None) -> Part:
            stored = weights.stored[key]
            wanted = rounded(stored.dtype)
            applied = changed.get(member, ()) if member is not None else ()
            return Part(name, key, wanted, stored.shape, applied, wanted is not stored.dtype)

        names = {key: key for key in weights.stored}
        if head.classifies:
            names = own_names(model, weights, by_key, new)
        parts = [part(name, key, by_key.get(key)) for key, name in names.items()]
        parts += [part(member, key, member) for member, key in origin.items() if member not in found]
        usual = rounded(next(s.dtype for s in weights.stored.values() if s.dtype.is_floating_point))
        known = tensors(model)
        parts += [Part(n, None, usual, tuple(known[n].shape), applied) for n, applied in new.items()]
        return cls(parts, untied=bool(groups), left=tuple(key for key in weights.stored if key not in names))


def changes(model: nn.Module, name: str) -> dict[str, tuple[Change, ...]]:
    """Which adapters called `name` change which parameters of the base; raises NotMergeable with all that cannot."""
    found: dict[str, tuple[Change, ...]] = {}
    problems = []
    for site, adapter in adapters_of(model, name).items():
        first: dict[int, str] = {}  # a weight with several names below the host changes under its first
        try:
            for leaf, parameter in tensors(adapter.host).items():
                leaf_of = first.setdefault(id(parameter), leaf)
                if isinstance(parameter, nn.Parameter) and adapter.merged(parameter, leaf_of) is not parameter:
                    name = f"{site}.{leaf}" if site else leaf
                    found[name] = (*found.get(name, ()), (adapter, leaf_of))
        except NotMergeable as error:
            problems += [Problem(f"`{site or 'the model'}`: {text}", hint) for text, hint in error.problems]
    if problems:
        raise NotMergeable.of(problems)
    return found


def brought(
    model: nn.Module, weights: Weights, changed: dict[str, tuple[Change, ...]], found: dict[str, str]
) -> dict[str, tuple[Change, ...]]:
    """What of `changed` the files lack, or have for other labels, and the adapter brings whole: a classifier's head.

    Raises AdapterError when neither has it.
    """
    known, prefix = tensors(model), str(getattr(model, "base_model_prefix", ""))
    fits = {name for name, key in found.items() if tuple(known[name].shape) == weights.stored[key].shape}
    lacking = [name for name in known if atop(name, prefix) and name not in fits]
    new = {name: changed[name] for name in lacking if name in changed and changed[name][-1][0].replaces}
    if nowhere := [name for name in lacking if name not in new]:
        text = "`{}` is not in the base, and not in the adapter, so there is nothing to classify with"
        hint = "the base may be another than it was trained on, or the head was not saved (`modules_to_save`)"
        raise AdapterError.of([Problem(text.format(name), hint) for name in nowhere])
    return new


def own_names(model: nn.Module, weights: Weights, by_key: dict[str, str], new: Collection[str]) -> dict[str, str]:
    """The name in a merged classifier of every tensor in the files that belongs to it: the model's own.

    Beside a new head, names without the prefix of the model inside the model would not be found. Where some of the
    model is in the files in another form, what seems to belong to nothing may be that, and all stays as it is.
    """
    known = tensors(model)
    there = {id(known[name]) for name in [*by_key.values(), *new]}
    if all(id(tensor) in there for tensor in known.values()):
        return {key: by_key[key] for key in weights.stored if key in by_key}
    return {key: key for key in weights.stored if key not in new}


def alike(group: set[str], changed: dict[str, tuple[Change, ...]]) -> bool:
    """Whether the members of `group`, which share one weight, all change in the same way and so go on sharing it."""
    ways = {tuple((id(a.follows or a), leaf) for a, leaf in changed.get(member, ())) for member in group}
    return len(ways) == 1


def refuse_inseparable(model: nn.Module, groups: list[set[str]]) -> None:
    """Raise NotMergeable for a changed weight that others share, but for embedding and head, which can be untied."""
    problems = [
        Problem(f"`{'`, `'.join(sorted(group))}`: one weight in this model, of which the adapter changes a part")
        for group in groups
        if len(group) > 2 or group - ends(model)
    ]
    if problems:
        raise NotMergeable.of(problems)


def refuse_unfit(
    model: nn.Module, weights: Weights, changed: dict[str, tuple[Change, ...]], origin: dict[str, str]
) -> None:
    """Raise where the files do not hold what the adapter changes, or in another shape."""
    if missing := sorted(name for name in changed if name not in origin):
        text = f"{weights.place}: `{{}}` is not in the files under this name, so it cannot be merged into"
        hint = "load the base with transformers once and `save_pretrained` it, then merge into that folder"
        raise ModelError.of([Problem(text.format(name), hint) for name in missing])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
    wrong = [name for name, key in origin.items() if shapes[name] != weights.stored[key].shape]
    if wrong:
        text = f"{weights.place}: `{{}}` is {{}} in the files, {{}} by `config.json`"
        raise ModelError.of([Problem(text.format(n, weights.stored[origin[n]].shape, shapes[n])) for n in wrong])
