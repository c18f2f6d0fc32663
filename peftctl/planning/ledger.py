"""An account of what torch does with tensors that have no content: bytes alive, work done.

Whatever computes, from the model's own forward to the optimizer's arithmetic, passes here one operation at a time. A
tensor's storage is booked when it appears and struck off when Python lets go of it, as the allocator would.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.detach}
"""Operations that move no bytes."""


DEVICE = torch.ops.prim.device.default
"""No operation: Python has asked where a tensor is."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every storage under the heading of the moment, and every operation's work."""

    def __init__(self, share: float = 1.0, a_row: int = 1, width: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.a_row = min(a_row, width - 1) if width else a_row
        """Labels of a row that are trained, which is also how often a row is repeated for each of its labels."""
        self.width = width
        """Labels of a row; 0 where there are none."""
        self.share = share
        """Of the elements of a mask, those that are true: nobody can look."""
        self.heading = "workspace"
        self.live: Counter[str] = Counter()
        """Bytes alive by heading."""
        self.moments: dict[str, Counter[str]] = {}
        """`live` when most bytes were alive: in the forward, and while more and while less than half of what it has
        kept is still there in the backward."""
        self.flops = 0
        self.moved = 0
        """Bytes read and written by operations other than products of matrices."""
        self.calls = 0
        self.made = 0
        """Bytes of all storages that have come."""
        self._known: dict[int, str] = {}
        """Heading of each storage."""
        self._watched: dict[int, weakref.finalize[Any, Any]] = {}
        self._total = self._kept = 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for watch in self._watched.values():  # a storage that is freed later, with a watch on it, brings torch down
            watch.detach()
        self._watched.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE:
            return func(*args, **kwargs)
        result = self.guessed(func, args)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self.work(func, args, kwargs, result)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.book(tensor)
        return result

    def guessed(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The result of an operation that depends on content, as far as shapes tell it; else NotImplemented."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            kind = args[0].dtype
            return False if kind is torch.bool else 0.0 if kind.is_floating_point else 0
        if packet is aten.equal:
            return True
        if packet is aten.nonzero:
            mask = args[0]
            return mask.new_empty(self.true(mask), mask.ndim, dtype=torch.long)
        if packet is aten.repeat_interleave and len(args) == 1:
            return args[0].new_empty(self.a_row * args[0].numel(), dtype=torch.long)
        if packet in (aten.index, aten.index_put_, aten._index_put_impl_, aten.index_put) and masked(args[1]):
            tensor, mask = args[0], args[1][0]
            if packet is aten.index:
                return tensor.new_empty(self.true(mask), *tensor.shape[mask.ndim :])
            return tensor.clone() if packet is aten.index_put else tensor
        return NotImplemented

    def true(self, mask: torch.Tensor) -> int:
        """How many elements of a mask are true; of one with a single axis, all: a column counts if any row wants it."""
        if self.width and mask.ndim == 2 and self.width - mask.shape[1] in (0, 1):  # of labels, or of all but the first
            return max(1, min(mask.numel(), self.a_row * mask.shape[0]))
        return mask.numel() if mask.ndim == 1 else max(1, math.ceil(self.share * mask.numel()))

    @property
    def phase(self) -> str:
        """Where in the step this is."""
        if self.heading != "workspace":
            self._kept = max(self._kept, self.live["activations"])
            return "forward"
        return "early" if 2 * self.live["activations"] > self._kept else "late"

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count the storages of `tensors`: they are there all the time."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage()._cdata, "")

    def book(self, tensor: torch.Tensor) -> None:
        """Enter a storage that is not known yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = self.heading
        self._watched[key] = weakref.finalize(storage, self.strike, key, size)
        self._watched[key].atexit = False
        self.live[self.heading] += size
        self._total += size
        self.made += size
        if self._total > self.moments.get(self.phase, Counter()).total():
            self.moments[self.phase] = self.live.copy()

    def strike(self, key: int, size: int) -> None:
        """Nobody holds the storage any more."""
        del self._watched[key]
        heading = self._known.pop(key)
        self.live[heading] -= size
        self._total -= size

    def move(self, tensor: torch.Tensor | None, heading: str) -> None:
        """Book a storage under another heading."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        before = self._known.get(storage._cdata)
        if before is not None:
            self._known[storage._cdata] = heading
            self.live[before] -= storage.nbytes()
            self.live[heading] += storage.nbytes()

    def work(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        """Count what an operation computes, or what it moves."""
        packet = func.overloadpacket
        self.calls += 1
        count = flop_registry.get(packet)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3]))  # type: ignore[no-untyped-call]
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4]))  # type: ignore[no-untyped-call]
        elif packet not in FREE and not func.is_view:
            self.moved += sum(
                each.numel() * each.element_size()
                for each in tree_iter((args, result))
                if isinstance(each, torch.Tensor)
            )


def masked(indices: Any) -> bool:
    """Whether an index is one mask."""
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype is torch.bool
