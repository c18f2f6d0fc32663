"""`peftctl merge`: the adapter written into the weights of its base, and the proof that nothing else happened."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from peftctl.errors import RunError
from peftctl.exports.card import card
from peftctl.exports.dequantise import Quantised
from peftctl.exports.export import Export
from peftctl.exports.merge import merge as merge_folder
from peftctl.exports.pipeline import merge_pipeline
from peftctl.models.allocator import keep_memory
from peftctl.models.head import DIFFUSION, SEQUENCES, TOKENS
from peftctl.models.source import local
from peftctl.training.signals import Stop
from peftctl.verbs.events import Listen, silent, speaker, ticker
from peftctl.verbs.facts import facts_of_run
from peftctl.verbs.signalled import polled
from peftctl.verbs.target import open_target, with_base

NOTHING = "; nothing was written", "run the same command again"
"""How a signal ends a merge."""


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
        PeftctlError: whatever is wrong; nothing that looks finished is left behind.
    """
    keep_memory()
    found = with_base(open_target(target), base)
    if found.adapter is None:
        raise RunError(f"{target}: there is no adapter to merge", "train first")
    try:
        found.check_base()
    except RunError as error:
        if base is None:
            raise
        [(text, hint)] = error.problems  # they asked for it
        listen({"event": "warning", "text": text, "hint": hint})
    say = speaker(listen)
    settings = found.recipe.export if found.recipe else Export()
    folder = local(found.model.name_or_path, found.model.revision, say=say)
    with Stop() as stop:
        alike: dict[str, Any] = {
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
            "base_name": Path(found.model.name_or_path).name,
            "beside": {"README.md": card(facts_of_run(found.folder, merged=True))} if found.folder else None,
            "poll": partial(polled, stop, *NOTHING),
            "say": say,
        }
        where = cast(Literal["base", "dequantised"], into or settings.into)
        if found.head is DIFFUSION:
            report = merge_pipeline(folder, found.adapter, Path(output), into=where, **alike)
        else:
            report = merge_folder(
                folder,
                found.adapter,
                Path(output),
                head=found.head,
                into=where,
                quantised=Quantised.of(found.model),
                progress=ticker(listen, "merging"),
                **alike,
            )
    tell(report, listen)
    return {"path": str(output), **report}


def tell(report: dict[str, Any], listen: Listen) -> None:
    """The report in a few lines."""
    proof, tensors = report["proof"], report["tensors"]
    near = proof.get("merged_from_adapter")
    if near is None:  # of a network that draws
        told = f"{proof['difference']:.2g} of its predictions; {proof['tolerance']:g} is allowed"
        rows = [
            ["tensors changed", f"{len(tensors['changed'])} of {tensors['total']}"],
            ["distance from the adapter", told],
        ]
        listen({"event": "table", "title": "merged", "columns": ["proof", "figure"], "rows": rows})
        return
    what = "class" if report["model"] in (SEQUENCES.what, TOKENS.what) else "token"
    rows = [
        ["tensors changed", f"{len(tensors['changed'])} of {tensors['total']}"],
        ["distance from the adapter", f"{proof['difference']:.2g} of the logits; {proof['tolerance']:g} is allowed"],
        [f"same most probable {what}", f"{near['top1_agreement']:.1%} of {proof['positions']} positions"],
    ]
    if run := proof["merged_from_quantised_run"]:
        rows.append(["distance from the quantised run", f"{run['relative_norm']:.2g} of the logits, not judged"])
    listen({"event": "table", "title": "merged", "columns": ["proof", "figure"], "rows": rows})
