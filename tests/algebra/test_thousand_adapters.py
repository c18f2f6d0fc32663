"""A thousand small adapters of one base, one after the other: memory stays flat."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from tiny import build, logits

import peftctl

WARM, ROUNDS = 20, 1000
OBJECTS = 200
"""Python objects that may have come, by caches; an adapter that stays has a hundred."""
MEMORY = 16 << 20
"""Bytes of the process that may have come; a thousand adapters that stay take far more than a hundred MiB."""


def test_a_thousand_adapters_in_turn_leave_nothing_behind(make):
    folders = [make(seed, target_modules=["q_proj", "v_proj"], r=128) for seed in range(2)]
    model, bare = build("llama"), logits(build("llama"))
    wanted = [logits(peftctl.load(build("llama"), folder)) for folder in folders]
    assert not torch.allclose(*wanted, atol=1e-3)

    def one(number):
        peftctl.load(model, folders[number % 2], name=f"a{number}")  # a new name each time, as new adapters have
        assert torch.equal(logits(model), wanted[number % 2])
        peftctl.detach(model, f"a{number}")

    for number in range(WARM):
        one(number)
    objects, memory = alive(), resident()
    for number in range(WARM, WARM + ROUNDS):
        one(number)
    assert alive() - objects < OBJECTS
    assert resident() - memory < MEMORY
    assert torch.equal(logits(model), bare)


def alive() -> int:
    """Objects that Python's collector knows, after it has collected."""
    gc.collect()
    return len(gc.get_objects())


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
