"""Section c: every method of peftctl's that peft has too, beside peft's in a plain loop, at the same modest size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks import prepare
from benchmarks.job import Job
from benchmarks.report import spread
from benchmarks.side_by_side import ATTENTION
from benchmarks.turns import Arm, Measured, Plan, measure, peak, ratios, speeds

LENGTH, STEPS = 128, 1000


class Pair(NamedTuple):
    """A method in a recipe, and the same in peft."""

    ours: dict[str, Any]
    config: str
    arguments: dict[str, Any]
    shared: bool = True
    """Whether both start from the same adapter folder."""
    why: str = ""
    """Why starts or losses differ."""

    @property
    def name(self) -> str:
        words = [f"{key}" for key, value in self.ours.items() if value is True]
        return " ".join([self.ours["type"], *words])


ALL: dict[str, Any] = {"target_modules": "all-linear"}
RANK = {"r": 8, "lora_alpha": 16, **ALL}
OURS = {"r": 8, "alpha": 16, **ALL}
BUDGET = {"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, "total_step": STEPS}
VIRTUAL = {"num_virtual_tokens": 16}
WIDE = {"encoder_hidden_size": 576}
UNTRAINED = "peft keeps the tokens on disk, not the network that makes them: each starts by itself"

PAIRS = [
    Pair({"type": "lora", **OURS}, "LoraConfig", RANK),
    Pair({"type": "lora", **OURS, "use_rslora": True}, "LoraConfig", {**RANK, "use_rslora": True}),
    Pair({"type": "dora", **OURS}, "LoraConfig", {**RANK, "use_dora": True}),
    Pair(
        {"type": "adalora", **BUDGET, "alpha": 16, **ALL},
        "AdaLoraConfig",
        {**BUDGET, "lora_alpha": 16, **ALL},
        why="the loss that peft tells has the orthogonality penalty in it, peftctl's has not",
    ),
    Pair({"type": "vera", "r": 64, **ALL}, "VeraConfig", {"r": 64, **ALL}),
    Pair(
        {"type": "ia3"},
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    Pair({"type": "oft", "block_size": 32, **ALL}, "OFTConfig", {"oft_block_size": 32, "r": 0, **ALL}),
    Pair(
        {"type": "gralora", "r": 16, "k": 2, "alpha": 32, **ALL},
        "GraloraConfig",
        {"r": 16, "gralora_k": 2, "alpha": 32, "hybrid_r": 0, **ALL},
    ),
    Pair({"type": "prompt", **VIRTUAL}, "PromptTuningConfig", VIRTUAL),
    Pair({"type": "p_tuning", **VIRTUAL, **WIDE}, "PromptEncoderConfig", {**VIRTUAL, **WIDE}, False, UNTRAINED),
    Pair({"type": "prefix", **VIRTUAL}, "PrefixTuningConfig", VIRTUAL),
    Pair(
        {"type": "layers", "norms": True},
        "LNTuningConfig",
        {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
        False,
        "both start from the base's own norms",
    ),
]
ALONE = "bottleneck, fusion, ReFT, MoRA, QA-LoRA, Delta-LoRA, BitFit (SmolLM2 has no biases), top layers and full"
"""Methods that peft 0.21 does not have."""


def methods(plan: Plan) -> list[str]:
    """c: one pair after another, the two arms in turn."""
    model, recipe = prepare.smollm2(), prepare.fixed(LENGTH)
    rows = prepare.rows(f"fixed-{LENGTH}", recipe, model, 4)
    lines = [
        f"4 rows of {LENGTH} tokens a step, every token trained; peft in a plain loop with its default float32 "
        "adapters. Attention is sdpa in both, but for LoRA's peers, which take the faster of sdpa and eager. Without a "
        f"counterpart in peft, and not measured: {ALONE}.",
        "",
    ]
    for environment in plan.environments:
        lines += [
            f"### Allocator: {environment}",
            "",
            "| method | peftctl, tokens/s | peft, tokens/s | peftctl is | peak, GiB | peft's | losses differ by |",
            "|---|---|---|---|---|---|---|",
        ]
        notes = []
        for pair in PAIRS:
            job = Job(model=model, rows=rows, recipe={**recipe, "method": pair.ours})
            config = {"class": pair.config, "arguments": pair.arguments}
            if pair.shared:
                job = replace(job, start=prepare.start(pair.name.replace(" ", "-"), config, model))
            peer = replace(job, kind="loop", config={} if pair.shared else config)
            choices = ATTENTION if pair.ours["type"] == "lora" else ATTENTION[:1]
            arms = [Arm(name=pair.name, job=job), Arm(name=f"peft, {pair.name}", job=peer, choices=choices)]
            ours, theirs = measure(arms, plan, environment)
            lines.append(line(pair, ours, theirs, plan))
            notes += [f"- {one.arm.name} did not run: {one.error}" for one in (ours, theirs) if one.error]
            notes += [f"- {pair.name}: {pair.why}." for _ in range(bool(pair.why))]
        lines += ["", *notes, ""]
    return lines


def line(pair: Pair, ours: Measured, theirs: Measured, plan: Plan) -> str:
    """The row of one method."""
    if not (ours.rounds and theirs.rounds):
        return f"| {pair.name} | | | | | | did not run |"
    each = [one.rounds[0]["losses"] for one in (ours, theirs)]
    far = max(abs(a - b) for a, b in zip(*each, strict=False))
    return (
        f"| {pair.name} | {spread(speeds(ours, plan.warm))} | {spread(speeds(theirs, plan.warm))} | "
        f"{spread(ratios(ours, theirs, plan.warm), 2)} x | {peak(ours) / 2**30:.2f} | {peak(theirs) / 2**30:.2f} | "
        f"{far:.4f} of {each[1][0]:.2f} |"
    )
