"""`peftctl merge`: the adapter written into the weights of its base, and the proof that nothing else happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftctl.errors import Interrupted, NotMergeable, RunError
from peftctl.exports import proof
from peftctl.exports.card import card
from peftctl.exports.export import Export
from peftctl.exports.merge import REPORT, Merge, Quantised, merge_into
from peftctl.models.allocator import keep_memory
from peftctl.models.base import Model, fingerprint, load_tokenizer
from peftctl.models.device import choose_device, choose_dtype
from peftctl.models.source import local
from peftctl.training import storage
from peftctl.training.signals import Stop
from peftctl.verbs import provenance
from peftctl.verbs.events import Listen, silent, speaker, ticker
from peftctl.verbs.facts import facts_of_run
from peftctl.verbs.target import Target, open_target, with_base


def merge(
    target: str,
    output: str | Path,
    *,
    into: str | None = None,
    base: str | None = None,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Write base and adapter as one model into `output`, all or nothing, and return the report.

    Args:
        target: a run folder, an adapter folder or a recipe.
        output: a folder that does not exist yet.
        into: `base`, or `dequantised` for the weights that a 4- or 8-bit run was trained on; the recipe's when None.
        base: another name or path of the base model.

    Raises:
        NotMergeable: a method that no weight can express, or a merge that differs from its adapter.
        PeftctlError: whatever else is wrong; nothing that looks finished is left behind.
    """
    keep_memory()
    found = with_base(open_target(target), base)
    if found.adapter is None:
        raise RunError(f"{target}: there is no adapter to merge", "train first")
    if base is None:
        found.check_base()
    say = speaker(listen)
    settings = found.recipe.export if found.recipe else Export()
    into = into or settings.into
    folder = local(found.model.name_or_path, found.model.revision, say=say)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    quantised = held(found.model, into)
    with Stop() as stop, storage.staged(Path(output)) as staged:
        tick = stopping(stop, ticker(listen, "merging"))
        done = merge_into(
            staged,
            folder,
            found.adapter,
            dtype=dtype,
            quantised=quantised,
            shard_size=settings.shard_size * 1e9,
            tick=tick,
        )
        say("comparing the merged model with the adapter")
        proven = prove(found, folder, staged, done, into, say)
        record = report(found, folder, done, into, proven)
        (staged / REPORT).write_bytes(provenance.json_bytes(record))
        if found.folder is not None:
            text = card(facts_of_run(found.folder, merged=True))
            (staged / "README.md").write_text(text, encoding="utf-8")
        stopping(stop, lambda done, total: None)(1, 1)
    tell(record, listen)
    return {"path": str(output), **record}


def held(model: Model, into: str) -> Quantised | None:
    """How the base was held in training, when the merge goes into that."""
    if into == "base":
        return None
    if model.quantization == "none":
        raise RunError("`--into dequantised`: this adapter was trained on an unquantised base", "leave `--into` out")
    dtype = choose_dtype(model.dtype, choose_device(model.device))
    return Quantised(model.quantization, model.double_quantization, dtype)


def prove(
    target: Target, base: Path, merged: Path, done: Merge, into: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compare the merged model with the adapter on what it was merged into; judge the distance."""
    assert target.adapter is not None
    exact = replace(target.model, quantization="none", dtype="float32")
    probes = proof.probe_ids(load_tokenizer(replace(target.model, name_or_path=str(base), revision=None)))
    merged_logits = proof.plain_logits(merged, probes, exact)
    record: dict[str, Any] = {}
    if into == "base":
        found = proof.compare(proof.adapted_logits(base, target.adapter, probes, exact), merged_logits)
        proof.judge(found, proof.stored_dtype(merged))
        record["merged_against_adapter"] = found.record()
    if target.model.quantization != "none":
        ran = proof.compare(proof.adapted_logits(base, target.adapter, probes, target.model), merged_logits)
        if into == "dequantised":
            proof.judge(ran, torch.bfloat16)  # the run itself computed in half precision
        record["merged_against_the_quantised_run"] = ran.record()
    if not done.changed:
        raise NotMergeable(f"{target.adapter}: no weight changed", "the adapter is as it was before training")
    return record


def report(target: Target, base: Path, done: Merge, into: str, proven: dict[str, Any]) -> dict[str, Any]:
    """merge_report.json."""
    return {
        "adapter_sha256": done.adapter_sha256,
        "base": {"name": target.model.name_or_path, **fingerprint(base)},
        "into": into,
        "proof": proven,
        "bytes": done.bytes,
        "untied": done.untied,
        "changed": done.changed,
        "unchanged": done.unchanged,
        "versions": provenance.versions(),
        "merged": provenance.now(),
    }


def tell(record: dict[str, Any], listen: Listen) -> None:
    """The report in a few lines."""
    rows = [["tensors changed", str(len(record["changed"]))]]
    if record["unchanged"]:
        rows.append(["adapted but unchanged", str(len(record["unchanged"]))])
    for name, figures in record["proof"].items():
        label = name.replace("_", " ")
        rows.append([label, f"{figures['error']:.2g} of the logits, top token equal in {figures['top1']:.1%}"])
    listen({"event": "table", "title": "merged", "columns": ["", ""], "rows": rows})


def stopping(stop: Stop, tick: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`tick`, but a signal ends the merge; nothing is left of it."""

    def ticked(done: int, total: int) -> None:
        if stop.requested:
            raise Interrupted(f"stopped by {stop.requested}; nothing was written", "run the same command again")
        tick(done, total)

    return ticked
