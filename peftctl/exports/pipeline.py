"""An adapter written into the network of a pipeline of diffusers: a pipeline that needs neither peftctl nor peft."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftctl.engine.attach import methods
from peftctl.engine.merging import merge
from peftctl.engine.method import name_of
from peftctl.errors import ModelError, RunError
from peftctl.exports.companions import copy_files
from peftctl.exports.lineage import REPORT, digest, merged_before, refuse_twice
from peftctl.exports.merge import nothing, refuse_unmergeable
from peftctl.exports.plan import DType
from peftctl.exports.proof import TOLERANCES
from peftctl.exports.weights import Weights
from peftctl.methods import load
from peftctl.models.diffusion import contents, part
from peftctl.models.folder import NETWORKS, PIPELINE, read_json, weight_files
from peftctl.models.head import DIFFUSION
from peftctl.models.origin import origin
from peftctl.models.pipelines import blank, predict
from peftctl.models.quiet import Say, silent
from peftctl.training import filesystem
from peftctl.training.storage import staged

NOISES = 3
"""Noisy inputs of the proof, each at a timestep of its own."""

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*")


@torch.no_grad()
def merge_pipeline(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    dtype: DType = "auto",
    into: Literal["base", "dequantised"] = "base",
    shard_size: float = 5.0,
    base_name: str | None = None,
    beside: Mapping[str, str] | None = None,
    poll: Callable[[], None] = nothing,
    say: Say = silent,
) -> dict[str, Any]:
    """Write the pipeline in the folder `base` with `adapter` in its network to `output`; returns `merge_report.json`.

    The other parts are copied as they are. Arguments, and what is raised, are those of `exports.merge.merge`.
    """
    place = str(base)
    if into == "dequantised":
        raise RunError("export.into: `dequantised`: the networks of pipelines are not quantised", "use `base`")
    kind, classes = contents(base, place)
    before, identity = merged_before(base, place), digest(adapter)
    refuse_twice(identity, before, place)
    source, cls = base / kind.network, classes[kind.network]
    stored = Counter(one.dtype for one in Weights(source, f"{place}/{kind.network}").stored.values())
    wanted = stored.most_common(1)[0][0] if dtype == "auto" else getattr(torch, dtype)

    def network(folder: Path, of: torch.dtype) -> Any:
        poll()
        return part(folder, cls, f"{place}/{kind.network}", of, say)

    reference = network(source, torch.float32)
    alone = answers(reference)
    load(reference, adapter)
    method = methods(reference)["default"]
    refuse_unmergeable(method, adapter)
    expected = answers(reference)
    del reference
    with staged(output) as folder:
        merged = network(source, wanted)
        load(merged, adapter)
        merge(merged)
        poll()
        merged.save_pretrained(folder / kind.network, max_shard_size=f"{shard_size}GB")
        changed = differing(Weights(source, place), Weights(folder / kind.network, str(output)))
        del merged
        say("proving the merged pipeline against the adapter on its base")
        found = answers(network(folder / kind.network, torch.float32))
        proof: dict[str, Any] = {
            "difference": relative(found, expected),
            "effect": relative(expected, alone),
            "tolerance": TOLERANCES[wanted],
            "rounded_to": str(wanted).removeprefix("torch."),
        }
        if not proof["difference"] <= proof["tolerance"]:
            text = f"{output}: the merged network is not the adapter on its base: its predictions differ by "
            raise ModelError(f"{text}{proof['difference']:.2g}, more than {proof['tolerance']:.2g}")
        copy_parts(base, folder, kind.network, place, say)
        report = {
            "adapter": {"sha256": identity, "method": name_of(method)},
            "base": origin(base, base_name or base.name),
            "model": DIFFUSION.what,
            "merged_before": before,
            "into": "base",
            "dtype": dtype,
            "tensors": changed,
            "proof": proof,
            "versions": {name: version(name) for name in ("peftctl", "torch", "diffusers", "safetensors")},
        }
        filesystem.write(folder / REPORT, [json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n"])
        for name, text in (beside or {}).items():
            filesystem.write(folder / name, [text.encode()])
        poll()
    return report


def answers(network: nn.Module) -> Tensor:
    """What the network makes of random input, always the same [n, channels, height, width]."""
    chance = torch.Generator().manual_seed(0)

    def drawn(one: Tensor) -> Tensor:
        return torch.randn(NOISES, *one.shape[1:], generator=chance)

    sample, _, conditions = blank(network)
    times = torch.linspace(1, 999, NOISES).round()
    given = {name: drawn(value) for name, value in conditions.items()}
    return predict(network, drawn(sample), times, given)


def relative(some: Tensor, others: Tensor) -> float:
    """The largest difference, relative to the largest of the others, which counts as one at least."""
    return float((some - others).abs().max() / max(1.0, float(others.abs().max())))


def differing(before: Weights, after: Weights) -> dict[str, Any]:
    """How many tensors there are, and the names of those that differ. Raises ModelError where they have other names."""
    if odd := sorted(before.stored.keys() ^ after.stored.keys()):
        raise ModelError(f"{after.place}: `{odd[0]}` is not both in the base and in what was written")
    changed = [name for name in before.stored if not torch.equal(before.read(name), after.read(name))]
    return {"total": len(before.stored), "changed": changed}


def copy_parts(base: Path, folder: Path, network: str, place: str, say: Say) -> None:
    """Everything of the pipeline but its network; a part whose weights are not here is left out of the index too."""
    index = read_json(base / PIPELINE, place)
    for name, said in index.items():
        if name == network or not isinstance(said, list) or said[:1] in ([], [None]):
            continue
        try:
            needed = name in NETWORKS or name == "safety_checker"
            weights = [file.name for file in weight_files(base / name, f"{place}/{name}")] if needed else []
        except ModelError:
            if name in NETWORKS:
                raise
            say(f"`{name}` is left out: its weights are not in `{place}`")
            index[name] = [None, None]
            continue
        filesystem.make_folder(folder / name)
        copy_files(base / name, folder / name, (*BESIDE, *weights))
    filesystem.write(folder / PIPELINE, [json.dumps(index, indent=2).encode() + b"\n"])
    copy_files(base, folder, ("LICENSE*", "LICENCE*", "NOTICE*"))
