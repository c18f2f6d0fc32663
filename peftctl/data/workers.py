"""Encoding on all cores: forked processes take rows in turns and give them back in order.

Every process has one piece of work at a time, so memory does not grow with the rows, and what comes out does not depend
on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any

from peftctl.data.fitting import Encoded
from peftctl.data.formats import Example
from peftctl.data.reading import RowEncoder
from peftctl.errors import DataError, OutOfMemory

MANY = 10_000
"""Rows from which it is worth to fork."""
CHUNK = 200
"""Rows in a piece of work."""
WORKERS = "PEFTCTL_WORKERS"
"""Environment variable: how many processes encode, at most."""

Item = Example | DataError
Outcome = list[Encoded] | DataError
"""A row as it is trained, or what is wrong with it."""


def outcomes(items: Iterator[Item], encoder: RowEncoder, rows: int) -> Iterator[tuple[Item, Outcome]]:
    """Every row with what it becomes, in order; `rows` is about how many there are.

    `encoder` ends with the stop tokens and counts of all of them. Raises OutOfMemory when a process is killed.
    """
    number = min(workers(), rows // MANY * 2)
    if number < 2:
        for item in items:
            yield item, outcome(item, encoder)
        return
    context: Any = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for _ in range(number):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, encoder, [*pipes, here]), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        yield from in_turns(items, pipes, encoder)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def in_turns(items: Iterator[Item], pipes: list[Connection], encoder: RowEncoder) -> Iterator[tuple[Item, Outcome]]:
    """Sends a piece of work to every process, then takes back the oldest and sends that process the next."""
    waiting: list[list[Item]] = []
    order = cycle(pipes)
    for pipe in pipes:
        if chunk := list(islice(items, CHUNK)):
            pipe.send(chunk)
            waiting.append(chunk)
    while waiting:
        pipe, chunk = next(order), waiting.pop(0)
        try:
            made, stop_ids, spelled = pipe.recv()
        except (EOFError, ConnectionError):
            hint = f"set {WORKERS}=1: rows are encoded one after another then"
            raise OutOfMemory("preparing rows: a process was killed, perhaps for want of memory", hint) from None
        if following := list(islice(items, CHUNK)):
            pipe.send(following)
            waiting.append(following)
        encoder.stop_ids |= stop_ids
        encoder.spelled += spelled
        yield from zip(chunk, made, strict=True)


def outcome(item: Item, encoder: RowEncoder) -> Outcome:
    """What a row becomes."""
    if isinstance(item, DataError):
        return item
    try:
        return encoder.encode(item)
    except DataError as error:
        return error


def work(pipe: Connection, encoder: RowEncoder, others: list[Connection]) -> None:
    """The life of a process: encode what comes until nothing more does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()  # else it would not end when the first process does
    with suppress(EOFError, ConnectionError):  # nobody wants any more
        while True:
            chunk = pipe.recv()
            before = encoder.spelled
            made = [outcome(item, encoder) for item in chunk]
            pipe.send((made, encoder.stop_ids, encoder.spelled - before))


def workers() -> int:
    """How many processes may encode: this one's share of the cores; one where processes cannot be forked."""
    if sys.platform != "linux":
        return 1
    if (said := os.environ.get(WORKERS, "")).isdigit():
        return int(said)
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
