"""Checkpoints that are whole or not there: `checkpoints/step-000100/`.

    adapter/                the adapter as a PEFT folder, written by the caller
    trainable.safetensors   every trained tensor and stateful buffer by its live name, in its exact dtype
    optimizer.safetensors   optimizer state: `<parameter name>/<state key>`
    rng.safetensors         random generators: `<rank>/<generator>`
    state.json              step, surroundings, schedule, groups of the optimizer, and what the caller adds
    manifest.json           size and SHA-256 of every other file; written last

Committing: build a temporary sibling, sync all, read it back against the hashes from memory, rename, sync the parent.
A checkpoint that differs from its manifest by one bit is never resumed from; the newest one before it is. A file
`step-000100.pin` beside a checkpoint keeps it from being deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from peftctl.config.quote import shown
from peftctl.errors import NonFiniteError, Problem, RunError, StorageError
from peftctl.training import filesystem, manifest, snapshot, storage
from peftctl.training.tensors import pack, read_tensors, unpack, write_tensors

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors stay on the disk until they are restored."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What the caller gave to `save` as `state`."""
    surroundings: dict[str, str]
    """Versions, device, threads and processes of the run that wrote it."""
    scheduler: Any
    optimizer: dict[str, Any]

    def changed_since(self, device: torch.device) -> list[str]:
        """What differs now so that the same bits cannot be promised, such as `torch: 2.13.0 then, 2.14.0 now`."""
        now = snapshot.surroundings(device)
        names = sorted(now.keys() | self.surroundings.keys())
        pairs = ((name, self.surroundings.get(name, "none"), now.get(name, "none")) for name in names)
        return [f"{name}: {then} then, {here} now" for name, then, here in pairs if then != here]

    def restore_rng(self, rank: int = 0) -> bool:
        """Sets this rank's random generators; False when the run had fewer ranks.

        Call it last, right before the next step: building a model or starting a data loader draws random numbers.
        """
        saved = read_tensors(self.path / "rng.safetensors")
        mine = {name.removeprefix(f"{rank}/"): value for name, value in saved.items() if name.startswith(f"{rank}/")}
        if mine:
            snapshot.restore_rng(mine)
        return bool(mine)


def save(
    checkpoints: Path,
    step: int,
    *,
    trainable: Mapping[str, Tensor],
    optimizer: Any,
    names: Mapping[Parameter, str],
    scheduler: Any,
    state: Mapping[str, Any],
    write_adapter: Callable[[Path], object],
    rng: Sequence[Mapping[str, Tensor]] | None = None,
) -> Path:
    """Commits `checkpoints/step-NNNNNN` and returns it; one of the same step is replaced. One process calls it.

    `trainable`: live names -> trained tensors and buffers that training changes; `optimizer`: from torch, bitsandbytes
    or transformers, or accelerate's wrapper; `names`: each of its parameters -> its name; `scheduler`: anything with
    `state_dict`, or None; `state`: numbers, text, lists and dicts that the caller wants back (epoch, best, hashes of
    recipe and data); `write_adapter(folder)` creates and fills `folder`; `rng`: `snapshot.rng_state()` of every rank
    in order, of this process alone when left out.

    Raises NonFiniteError before anything is written, StorageError when the disk refuses; older ones stay as they are.
    """
    bad = [name for name, value in trainable.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        hint = "lower `trainer.learning_rate`; the checkpoint before it is good"
        raise NonFiniteError.of([Problem(f"{name}: not finite after step {step}", hint) for name in bad])
    groups, moments = snapshot.optimizer_record(optimizer, names)
    ranks = [snapshot.rng_state()] if rng is None else rng
    generators = {f"{rank}/{name}": value for rank, drawn in enumerate(ranks) for name, value in drawn.items()}
    loose: dict[str, Tensor] = {}
    record = {
        "format": FORMAT,
        "step": step,
        "surroundings": snapshot.surroundings(next(iter(trainable.values())).device),
        "scheduler": pack(None if scheduler is None else scheduler.state_dict(), loose, "scheduler"),
        "state": pack(dict(state), loose, "state"),
        "optimizer": groups,
    }
    if loose:
        raise TypeError(f"{', '.join(loose)}: a tensor belongs to `trainable`")
    with storage.staged(at(checkpoints, step), replace=True, check=manifest.verify) as folder:
        write_adapter(folder / "adapter")
        written = {
            "trainable.safetensors": write_tensors(folder / "trainable.safetensors", trainable),
            "optimizer.safetensors": write_tensors(folder / "optimizer.safetensors", moments),
            "rng.safetensors": write_tensors(folder / "rng.safetensors", generators),
            "state.json": filesystem.write(folder / "state.json", [json.dumps(record, indent=1).encode() + b"\n"]),
        }
        manifest.seal(folder, written)
    return at(checkpoints, step)


def restore(
    checkpoint: Checkpoint,
    trainable: Mapping[str, Tensor],
    optimizer: Any,
    names: Mapping[Parameter, str],
    scheduler: Any,
) -> None:
    """Puts tensors, optimizer and schedule back in place, bit for bit, but not the random generators.

    All or nothing: raises RunError with every name, shape and dtype that differs, StorageError for parts that do not
    belong together, before it changes any of them.
    """
    saved = read_tensors(checkpoint.path / "trainable.safetensors")
    moments = read_tensors(checkpoint.path / "optimizer.safetensors")
    problems = _mismatch(saved, trainable) + snapshot.optimizer_mismatch(checkpoint.optimizer, optimizer, names)
    _refuse(checkpoint.path, problems)
    try:
        unpack(checkpoint.optimizer, moments)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # nobody but a stranger seals such a checkpoint
        what = f"{checkpoint.path}: `state.json` asks for what `optimizer.safetensors` does not hold"
        raise StorageError(what, "train anew with `--output`") from error
    _copy(saved, trainable)
    snapshot.restore_optimizer(checkpoint.optimizer, moments, optimizer, names)
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.scheduler)


def restore_weights(path: Path, trainable: Mapping[str, Tensor]) -> None:
    """Puts the tensors of the checkpoint at `path` back and nothing else: to end with the best ones.

    Raises StorageError when it is damaged, RunError when it is of something else.
    """
    manifest.verify(path)
    saved = read_tensors(path / "trainable.safetensors")
    _refuse(path, _mismatch(saved, trainable))
    _copy(saved, trainable)


def at(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return checkpoints / f"step-{step:06d}"


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint; StorageError lists all that is damaged."""
    manifest.verify(path)
    try:
        record = json.loads((path / "state.json").read_bytes())
        if record["format"] != FORMAT:
            raise StorageError(f"{path}: format {shown(str(record['format']))}; this version reads {FORMAT}")
        found = Checkpoint(
            path=path,
            step=record["step"],
            state=unpack(record["state"], {}),
            surroundings=record["surroundings"],
            scheduler=unpack(record["scheduler"], {}),
            optimizer=record["optimizer"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: `state.json` is not what this version writes") from error
    if not (type(found.step) is int and all(isinstance(one, dict) for one in (found.state, found.surroundings))):
        raise StorageError(f"{path}: `state.json` is not what this version writes")
    if not (isinstance(found.scheduler, dict | None) and snapshot.is_record(found.optimizer)):
        raise StorageError(f"{path}: `state.json` is not what this version writes")
    if (match := _FOLDER.fullmatch(path.name)) and int(match[1]) != found.step:
        raise StorageError(f"{path}: holds step {shown(str(found.step))}", "give the folder its own name back")
    return found


def latest(checkpoints: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, by step and never by date, and the newer ones with why they do not.

    First clears what a killed process left, so only the process that owns the run may ask.
    """
    storage.sweep(checkpoints)
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(_steps(checkpoints)):
        try:
            return load(path), skipped
        except StorageError as error:
            skipped.append((path, "; ".join(problem.text.removeprefix(f"{path}: ") for problem in error.problems)))
    return None, skipped


def prune(checkpoints: Path, keep: int, best: int | None = None) -> list[Path]:
    """Deletes checkpoints older than the newest `keep` that verify, two at least, except step `best`; returns them."""
    verified, gone = 0, []
    for step, path in reversed(_steps(checkpoints)):
        if verified < max(keep, 2):
            with suppress(StorageError):
                load(path)
                verified += 1
        elif step != best and not path.with_name(f"{path.name}.pin").exists():
            storage.discard(path)
            gone.append(path)
    return gone


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders with their steps, oldest step first."""
    with filesystem.guarded(checkpoints):
        entries = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    return sorted((int(match[1]), path) for path in entries if (match := _FOLDER.fullmatch(path.name)))


def _mismatch(saved: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> list[str]:
    """Where the saved tensors are not those that this run trains."""
    problems = [f"`{name}` is missing in the checkpoint" for name in trainable if name not in saved]
    problems += [f"`{name}` is in the checkpoint only" for name in saved if name not in trainable]
    for name, live in trainable.items():
        if name in saved and (live.shape, live.dtype) != (saved[name].shape, saved[name].dtype):
            problems.append(f"`{name}` is {_shape(live)}; the checkpoint holds {_shape(saved[name])}")
    return problems


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        hint = "resume with the recipe of the run, or train anew with `--output`"
        raise RunError.of([Problem(f"{path}: {problem}", hint) for problem in problems])


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> None:
    for name, tensor in trainable.items():
        tensor.copy_(saved[name])


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
