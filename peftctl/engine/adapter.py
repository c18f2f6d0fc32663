"""The one concept of the engine: an adapter stands around one module of the base model, its host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.errors import AdapterError, NotMergeable


class Adapter(nn.Module):
    """Stands around one module of the base model, its `host`: a linear, a block or the whole model.

    `forward` receives the host's own forward as `base` and returns what the host should now return.
    Parameters are float32 and used in the dtype of their input.
    """

    scalable: ClassVar[bool] = False
    """Whether `strength` may differ from one: the adapter adds a weight update that it multiplies by it."""

    takes: ClassVar[tuple[str, ...]] = ()
    """Keywords that this adapter is to be given beside those that its host knows, such as `prompt_mask`."""

    host: nn.Module
    """The adapted module: a plain reference, because a child would be a cycle."""

    follows: Adapter | None = None
    """The adapter of another host that this one repeats, because their hosts share one weight: no child either."""

    replaces: ClassVar[bool] = False
    """Whether `merged` gives values of its own, whatever it is given."""

    strength: float = 1.0
    """The weight given by `activate`; 1 is the adapter as trained."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        """The host parameter `name`, as the host stores it, that makes this adapter unnecessary.

        Computed in float32 and returned in the dtype of `value`.
        """
        raise NotMergeable(f"{type(self).__name__} changes more than a weight and cannot be merged")

    @torch.no_grad()
    def continue_from(self, earlier: Adapter) -> None:
        """Start as `earlier` ended, an adapter around the same host; raises AdapterError where that cannot be."""
        mine, theirs = self.state_dict(keep_vars=True), earlier.state_dict()
        if type(self) is not type(earlier) or mine.keys() != theirs.keys():
            raise AdapterError(f"a {type(earlier).__name__} there, a {type(self).__name__} with other tensors here")
        for leaf, tensor in theirs.items():
            if mine[leaf].shape != tensor.shape:
                text = f"`{leaf}` has shape {list(tensor.shape)} there, {list(mine[leaf].shape)} here"
                raise AdapterError(text, "give the method the settings that the adapter was made with")
            mine[leaf].copy_(tensor)

    def exported(self) -> dict[str, Tensor]:
        """Leaf -> tensor of what HF PEFT's file holds of this adapter: its state, unless that is kept in another form.

        Loading writes into these tensors, so a method read from a folder (`from_peft`) has them as its state.
        """
        return self.state_dict(keep_vars=True)

    def private(self) -> dict[str, Tensor]:
        """Leaf -> tensor of what training needs to go on and HF PEFT's file has no place for: an encoder of prompts."""
        return {}

    def peft_key(self, site: str, leaf: str) -> str:
        """HF PEFT's name on disk for the tensor `leaf` of the adapter at `site`."""
        return f"base_model.model.{site}.{leaf}"


class Stack(nn.ModuleDict):
    """The adapters of one host, by name. The active ones chain, each receiving the one before as its base."""

    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    """With names here, each row of the input uses the adapter of its name alone instead; None is the base."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            return self.by_row(self.rows, base, *args, **kwargs)
        takes = {name: cast(Adapter, adapter).takes for name, adapter in self.items()}
        told = {key: kwargs.pop(key) for keys in takes.values() for key in keys if key in kwargs}
        for name in self.active:
            base = partial(self[name], base, **{key: told[key] for key in takes[name] if key in told})
        return base(*args, **kwargs)

    def by_row(
        self, names: Sequence[str | None], base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """x [rows, ...] -> y [rows, ...], a group of rows for each name; `rows` is a multiple of the names."""
        each, rest = divmod(len(x), len(names))
        if rest:
            text = f"{len(names)} names for a batch of {len(x)} rows"
            raise AdapterError(f"rows: {text}", "one name, or None, for each row of the batch")
        y: Tensor | None = None
        for name in dict.fromkeys(names):
            chosen = torch.tensor([n == name for n in names], device=x.device).repeat_interleave(each)
            around = partial(self[name], base) if name is not None and name in self else base
            part = around(x[chosen], *args, **kwargs)
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[chosen] = part
        assert y is not None
        return y


class Linear(nn.Linear):
    """A linear kept in float32 and used in the dtype of its input: x [..., in] -> y [..., out]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
