"""An adapter written into the weights of its base: tensor by tensor, proved, and whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from peftctl.engine.attach import methods
from peftctl.engine.method import Method, name_of
from peftctl.errors import NotMergeable, RunError, StorageError
from peftctl.exports.companions import classifier_config, copy_companions, write_config
from peftctl.exports.dequantise import Dequantised, Quantised, linears
from peftctl.exports.difference import compare
from peftctl.exports.lineage import REPORT, digest, merged_before, refuse_twice
from peftctl.exports.plan import DType, Part, Plan
from peftctl.exports.probes import probes
from peftctl.exports.proof import prove
from peftctl.exports.shards import write_shards
from peftctl.exports.skeleton import keys, skeleton, untie
from peftctl.exports.weights import Weights
from peftctl.methods import load
from peftctl.models.adapted import head_of
from peftctl.models.head import PICTURES, Head
from peftctl.models.origin import origin
from peftctl.models.quiet import Say, few, silent
from peftctl.models.tokenizer import read_tokenizer
from peftctl.training import filesystem
from peftctl.training.storage import staged

NAME = "default"
GB = 10**9


def nothing(*_: int) -> None:
    """A `poll` that lets go on, and a `progress` that nobody follows."""


@torch.no_grad()
def merge(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    head: Head | None = None,
    dtype: DType = "auto",
    into: Literal["base", "dequantised"] = "base",
    quantised: Quantised | None = None,
    shard_size: float = 5.0,
    base_name: str | None = None,
    texts: Sequence[str] = (),
    beside: Mapping[str, str] | None = None,
    memory: int | None = None,
    poll: Callable[[], None] = nothing,
    say: Say = silent,
    progress: Callable[[int, int], None] = nothing,
) -> dict[str, Any]:
    """Write the model in the folder `base` with `adapter` in its weights to `output`, and return `merge_report.json`.

    Args:
        base: the unquantised model, a folder of safetensors.
        adapter: a folder in HF PEFT's format.
        output: must not exist. It comes into being when everything is written and proved.
        head: what kind of model it is; what the adapter says when None.
        dtype: of all weights; `auto` leaves each as the base has it, and untouched ones bit for bit.
        into: `dequantised` merges into what a quantised run was trained on; it needs `quantised`.
        quantised: how the base was quantised when the adapter was trained, if it was.
        shard_size: largest file, in GB.
        base_name: what the report calls the base; the name of its folder when None.
        texts: probes for the proof, beside our own.
        beside: more files for the folder, name -> text.
        memory: what the proof's models may take, in bytes; a share of what is free when None.
        poll: called often; raises to stop.
        say: hears the news, one line each.
        progress: bytes written, and to write.

    Raises:
        AdapterError: a damaged adapter, one of another base, one that is merged into `base` already, or
            (NotMergeable) one that is more than a change of weights.
        ModelError: a base that cannot be read or is quantised on disk; a proof that fails.
        StorageError: `output` exists, the disk refuses, or gave back other than was written.
        RunError: `dequantised` for a run that was not quantised.
    """
    place = str(base)
    if into == "dequantised" and quantised is None:
        raise RunError("export.into: `dequantised`: this adapter was not trained on quantised weights", "use `base`")
    head = head or head_of(adapter, base)
    weights = Weights(base, place)
    model = skeleton(base, place, head)
    untie(model, weights)
    before, identity = merged_before(base, place), digest(adapter)
    refuse_twice(identity, before, place)
    load(model, adapter, NAME)
    refuse_unmergeable(methods(model)[NAME], adapter)
    if into == "base" and methods(model)[NAME].needs_quantised:
        text = "export.into: `base`: this adapter makes up for the quantisation that it was trained on"
        raise NotMergeable(text, "merge the run that made it, `--into dequantised`")
    method = name_of(methods(model)[NAME])
    if into == "dequantised" and quantised is not None:
        quantisable = linears(model, head)
        found = {key: quantisable[name] for name, key in keys(model, weights).items() if name in quantisable}
        weights = Dequantised(base, place, quantised, found)
    plan = Plan.of(model, weights, NAME, dtype, head)
    tokenizer = read_tokenizer(base, place, writes=not head.classifies)
    size = sum(part.size for part in plan.parts)
    with staged(output) as folder:
        refuse_full(folder, output, size)
        written = write_shards(folder, plan.parts, shard_size * GB, counted(weights, size, poll, progress))
        changed = classifier_config(model) if head.classifies else {}
        if plan.untied:
            changed["tie_word_embeddings"] = False
        write_config(folder, base, place, None if dtype == "auto" else getattr(torch, dtype), changed)
        copy_companions(folder, base, adapter)
        if plan.untied:
            say("embedding and output head were one weight and are two now")
        if plan.left:
            say(f"{len(plan.left)} tensors of the base are no part of the classifier and stay behind: {few(plan.left)}")
        say("proving the merged model against the adapter on its base")
        merged = Weights(folder, str(output))
        difference = compare(plan.parts, weights, merged, poll)
        if difference.unchanged:
            say(f"{len(difference.unchanged)} adapted tensors are as before: no update, or one too small for the dtype")
        proof = prove(
            adapter,
            (base, weights),
            (folder, merged),
            probes(tokenizer, rows_of(model), texts),
            head=head,
            dtypes={part.dtype for part in plan.parts if part.changes or part.cast},
            quantised=quantised,
            memory=memory,
            poll=poll,
        )
        proof.judge(str(output))
        if head == PICTURES and "pixel_values" not in proof.inputs:
            say("this model takes pictures in a way of its own: it was proved with texts alone")
        if proof.drowned:
            say("the adapter changes so little that rounding hides most of it: `export.dtype: float32` would keep it")
        report = {
            "adapter": {"sha256": identity, "method": method},
            "base": origin(base, base_name or base.name),
            "model": head.what,
            "merged_before": before,
            "into": into,
            "dtype": dtype,
            "untied_embeddings": plan.untied,
            "tensors": {
                "total": len(plan.parts),
                "changed": difference.changed,
                "new": [part.name for part in plan.parts if part.key is None],
                "left_behind": list(plan.left),
                "adapted_but_unchanged": difference.unchanged,
            },
            "proof": proof.record(),
            "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in written.items()},
            "versions": {name: version(name) for name in ("peftctl", "torch", "transformers", "safetensors")},
        }
        filesystem.write(folder / REPORT, [json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n"])
        for name, text in (beside or {}).items():
            filesystem.write(folder / name, [text.encode()])
        poll()
    return report


def counted(
    weights: Weights, size: int, poll: Callable[[], None], progress: Callable[[int, int], None]
) -> Callable[[Part], torch.Tensor]:
    """What gives each merged tensor, tells how far it is, and may be stopped."""
    done = 0

    def value(part: Part) -> torch.Tensor:
        nonlocal done
        poll()
        progress(done, size)
        done += part.size
        return part.after(weights)

    return value


def rows_of(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def refuse_full(folder: Path, output: Path, size: int) -> None:
    """Raise StorageError, before hours of writing, where the disk has not the room."""
    with filesystem.guarded(output):
        free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{output}: the merged model takes {size / GB:.1f} GB, {free / GB:.1f} GB are free",
            "free some space, or choose another place with `--output`",
        )


def refuse_unmergeable(method: Method, adapter: Path) -> None:
    """Raise NotMergeable, with the reason, for a method that is more than a change of weights."""
    if method.merges.startswith("not: "):
        text = f"{adapter}: `{name_of(method)}` does not merge: {method.merges.removeprefix('not: ')}"
        raise NotMergeable(text, "use the adapter as it is: `peftctl export --format peft`")
