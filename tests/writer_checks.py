"""What must hold of the writer of checkpoints, as functions that return what does not: for tests and for the soak."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from faulty_disk import Died, FaultyDisk, installed
from power_loss import Recorder, states, write_tree
from toy_run import Run, steps_in

from peftctl.errors import StorageError
from peftctl.training import checkpoint, storage

LIFE = (1, 1, 1, 0, 1)
"""Steps between saves; the fourth replaces the third."""


def life(run: Run, committed: Callable[[int], object] = lambda step: None) -> None:
    """Saves, and a prune after each; `committed` hears what must not be lost from then on."""
    for steps in LIFE:
        run.train(steps)
        run.save()
        committed(run.step)
        checkpoint.prune(run.folder, 2, best=None)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def power_losses(place: Path, cases: int, seed: int, forget: int | None = None) -> Iterator[str]:
    """Losses of power at any moment of a life: the newest that was committed is found, and is what was committed."""
    (place / "run").mkdir(parents=True)
    run, recorder = Run(place / "run" / "checkpoints", "sgd_plain"), Recorder(place / "run", forget)
    true: dict[int, dict[str, bytes]] = {}

    def committed(step: int) -> None:
        recorder.mark(str(step))
        true[step] = tree(checkpoint.at(run.folder, step))

    with installed(recorder):
        life(run, committed)
    for number, (left, marks) in enumerate(states(recorder, cases, seed)):
        fallen = place / f"fallen-{number}"
        write_tree(fallen, left)
        for what in judged(fallen / "checkpoints", {*map(int, marks)}, true):
            yield f"state {number}: {what}"
        shutil.rmtree(fallen)


def judged(folder: Path, committed: set[int], true: dict[int, dict[str, bytes]]) -> Iterator[str]:
    """What is wrong with the checkpoints that are left."""
    try:
        found, _ = checkpoint.latest(folder)
    except Exception as error:
        yield f"{type(error).__name__}: {error}"
        return
    there = found.step if found else 0
    if there < max(committed, default=0):
        yield f"step {max(committed)} was committed, {there or 'nothing'} is found"
    if found is not None and found.step in true and tree(found.path) != true[found.step]:
        yield f"step {found.step} is accepted, and is not what was committed"
    whole = {step for step in numbers(folder) if loads(checkpoint.at(folder, step))}
    if torn := {*numbers(folder)} - whole:
        yield f"steps {torn} are torn"
    if len(whole) < min(2, len(committed)):
        yield f"{len(committed)} were committed, {len(whole)} are left"


def numbers(folder: Path) -> list[int]:
    return steps_in(folder) if folder.exists() else []


def loads(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except StorageError:
        return False
    return True


def small_files(place: Path, cases: int, seed: int, forget: int | None = None) -> Iterator[str]:
    """Losses of power while a small file is replaced, three times: it is whole, and no older than the last promised."""
    place.mkdir(parents=True)
    path, recorder = place / "eval.json", Recorder(place, forget)
    contents = [bytes([48 + number]) * 300 for number in range(3)]
    with installed(recorder):
        for number, content in enumerate(contents):
            storage.replace_atomically(path, content)
            recorder.mark(str(number))
    for number, (left, marks) in enumerate(states(recorder, cases, seed)):
        may = [*contents[max(0, len(marks) - 1) :], *([None] if not marks else [])]
        if left.get("eval.json") not in may:
            yield f"state {number}: after {len(marks)} replacements it is {left.get('eval.json')!r:.40}"


def kills(place: Path) -> Iterator[str]:
    """Deaths at every call of a life: none torn, none lost, and the next step is that of the uninterrupted run."""
    with installed(FaultyDisk()) as disk:
        life(Run(place / "whole"))
    after, whole = {}, Run(place / "none")
    for _ in range(sum(LIFE) + 1):
        whole.train(1)
        after[whole.step] = whole.digest()
    for at, call in enumerate(disk.calls):
        folder, done = place / str(at), [0]
        with suppress(Died), installed(FaultyDisk(at=at)):
            life(Run(folder), done.append)
        found, _ = checkpoint.latest(folder)
        if torn := [step for step in numbers(folder) if not loads(checkpoint.at(folder, step))]:
            yield f"call {at}, {call}: steps {torn} are torn"
        if (found.step if found else 0) < max(done):
            yield f"call {at}, {call}: step {max(done)} is lost"
        if found is not None:
            resumed = Run(folder, seed=1)
            resumed.resume()
            resumed.train(1)
            if resumed.digest() != after[found.step + 1]:
                yield f"call {at}, {call}: resumed after {found.step} it is another run"
        shutil.rmtree(folder, ignore_errors=True)


def corruptions(place: Path, cases: int, seed: int) -> Iterator[str]:
    """Damage of every kind to the newest of two checkpoints: it is seen, and the older one is taken."""
    draw, run = Random(seed), Run(place / "run", "sgd_plain")
    for _ in range(2):
        run.train(1)
        run.save()
    newest, older = checkpoint.at(run.folder, 2), checkpoint.at(run.folder, 1)
    true = tree(newest)
    for number in range(cases):
        name = draw.choice(sorted(true))
        what = damage(newest / name, older / name, draw)
        try:
            found, _ = checkpoint.latest(run.folder)
            if found is None or found.step != (1 if what else 2):
                yield f"case {number}: {what} of {name}: {found and found.step} is taken"
        except Exception as error:
            yield f"case {number}: {what} of {name}: {type(error).__name__}: {error}"
        for extra in tree(newest).keys() - true.keys():
            (newest / extra).unlink()
        (newest / name).write_bytes(true[name])


def damage(path: Path, other: Path, draw: Random) -> str | None:
    """Damage a file; returns how, None where that changed nothing."""
    data = path.read_bytes()
    spot = draw.randrange(len(data))
    kind = draw.choice(["flip", "flip", "flip", "cut", "cut", "zeros", "missing", "more", "swap", "beside"])
    match kind:
        case "flip":
            new = data[:spot] + bytes([data[spot] ^ 1 << draw.randrange(8)]) + data[spot + 1 :]
        case "cut":
            new = data[:spot]
        case "zeros":
            end = draw.randrange(spot, len(data)) + 1
            new = data[:spot] + b"\0" * (end - spot) + data[end:]
        case "more":
            new = data + draw.randbytes(draw.randrange(1, 9))
        case "swap":
            new = other.read_bytes()
        case "missing":
            path.unlink()
            return kind
        case _:
            path.with_name("another.bin").write_bytes(b"x")
            return kind
    if new.rstrip() == data.rstrip():  # blanks at the end of the manifest say nothing
        return None
    path.write_bytes(new)
    return kind
