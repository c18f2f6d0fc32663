"""Sections a, b and d: LoRA on fixed rows, on tweets, and on a base in 4 bits, beside every peer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import prepare
from benchmarks.job import Job
from benchmarks.report import choices, losses, table
from benchmarks.turns import Arm, Measured, Plan, measure, run

OFF = {"fast": "off"}
ATTENTION: tuple[dict[str, Any], ...] = ({"attention": "sdpa"}, {"attention": "eager"})
SIZES = (8, 16, 32)
LAYOUTS = tuple({"micro": size, **way} for size in SIZES for way in ATTENTION)
LINES: tuple[dict[str, Any], ...] = tuple(
    {"packed": length, "micro": 1, "batch": 2048 // length} for length in (2048, 1024, 512)
)
"""Packed lines of TRL, as many a step as make 2,048 tokens: a step of 32 tweets has about 1,600."""

ROWS = (
    "The plain loop has right sums over the step, fused AdamW and no logging; Trainer and SFTTrainer log every step, "
    "with shuffling, autocast, checkpoints and reports off; all of them get the rows of a step sorted by length, and "
    "the fastest of the settings tried, where there was a choice. What losses would be without rounding and padding "
    "is told by peft in float32, one row a forward; from the second step on arms drift apart by more than rounding, "
    "because Adam begins with the signs of gradients, some of which bfloat16 flips."
)
PACKING = (
    "Where TRL packs (best fit decreasing), its steps hold rows of its own choice, about 2,048 tokens of them, so its "
    "losses are left out."
)


TELLING = ("fast", "pack", "compile", "kernel", "slow")
"""Words of notes that say how peftctl computes."""


def ours(job: Job, **changes: Any) -> list[Arm]:
    """Ours as it is by default, without a compiler on the machine, and without the fast path."""
    job = replace(job, kind="ours", changes=changes)
    return [
        Arm(name="peftctl", job=job),
        Arm(name="peftctl, no compiler", job=job, environment={"PEFTCTL_FAST_KERNELS": "off"}),
        Arm(name="peftctl, `fast: off`", job=replace(job, changes=OFF)),
    ]


def peers(job: Job, layouts: tuple[dict[str, Any], ...]) -> list[Arm]:
    """A plain loop with float32 and with bfloat16 adapters, Trainer and SFTTrainer, all with peft."""
    return [
        Arm(name="loop, peft", job=replace(job, kind="loop"), choices=layouts),
        Arm(name="loop, peft, bf16 adapters", job=replace(job, kind="loop", half=True), choices=layouts),
        Arm(name="Trainer, peft", job=replace(job, kind="trainer"), choices=layouts),
        Arm(name="SFTTrainer, peft", job=replace(job, kind="sft"), choices=layouts),
    ]


def packed(job: Job) -> Arm:
    """TRL with its packing, best fit decreasing."""
    choices = tuple({**line, **way} for line in LINES for way in ATTENTION)
    return Arm(name="SFTTrainer, packing", job=replace(job, kind="sft"), choices=choices, same_rows=False)


def fixed(plan: Plan) -> list[str]:
    """a: 4 x 512 tokens a step, all of them trained."""
    model, recipe = prepare.smollm2(), prepare.fixed(512)
    rows = prepare.rows("fixed-512", recipe, model, 4)
    job = Job(model=model, rows=rows, recipe=recipe, start=prepare.start("lora", prepare.PEFT_LORA, model))
    lines = [f"4 rows of 512 tokens a step in one micro-batch, every token trained. {ROWS}", ""]
    return lines + told([*ours(job), *peers(job, ATTENTION)], plan)


def tweets(plan: Plan) -> list[str]:
    """b: 32 tweets a step as chats, all tokens trained, then the answers alone."""
    model, lines = prepare.smollm2(), []
    for train_on, title in (("all", "All tokens"), ("assistant", "Answers alone")):
        recipe = prepare.tweets(train_on)
        rows = prepare.rows(f"tweets-{train_on}", recipe, model, 32)
        number, mean, most, share = prepare.lengths(rows)
        job = Job(
            model=model,
            rows=rows,
            recipe=recipe,
            start=prepare.start("lora", prepare.PEFT_LORA, model),
            batch=32,
            micro=32,
        )
        lines += [
            f"## {title}",
            "",
            f"{number} tweets, 32 a step, {mean:.1f} tokens on average and {most} at most, {share:.1%} of them "
            "trained. Tokens are those of rows, without padding. peftctl has micro-batches of 32, and packs where that "
            f"pays (`packing: auto`). {ROWS} {PACKING}",
            "",
        ]
        lines += told([*ours(job), *peers(job, LAYOUTS), packed(job)], plan)
    return lines


def nf4(plan: Plan) -> list[str]:
    """d: LoRA on a base in 4 bits (NF4, double quantisation), 4 x 512 tokens a step."""
    model, recipe = prepare.smollm2(), prepare.fixed(512)
    rows = prepare.rows("fixed-512", recipe, model, 4)
    start = prepare.start("lora", prepare.PEFT_LORA, model)
    job = Job(model=model, rows=rows, recipe=recipe, start=start, nf4=True)
    lines = [
        "4 rows of 512 tokens a step, every token trained; the linears in NF4 with double quantisation, by "
        "bitsandbytes in both. `prepare_model_for_kbit_training` is left out of the peers: it would cast what is not "
        f"quantised to float32, and slow them down. {ROWS} That base is not quantised.",
        "",
    ]
    return lines + told([*ours(job), *peers(job, ATTENTION)], plan)


def told(arms: list[Arm], plan: Plan) -> list[str]:
    """Measure in every environment; tables, losses, choices and what peftctl said of itself."""
    exact = Arm(name="float32", job=replace(arms[0].job, kind="loop", micro=1, exact=True, nf4=False))
    truth = run(exact, {}, plan, plan.environments[0]).get("losses", [])
    lines: list[str] = []
    for environment in plan.environments:
        found = measure(arms, plan, environment)
        lines += [f"### Allocator: {environment}", "", *table(found, plan), "", *losses(found, truth), ""]
        lines += choices(found)
        lines += said(found)
        lines.append("")
    return lines


def said(found: list[Measured]) -> list[str]:
    """Notes of peftctl's own on what it computes otherwise than it could."""
    kinds = [one for one in found if one.arm.job.kind == "ours" and one.rounds]
    notes = [(one.arm.name, text) for one in kinds for text in one.rounds[0]["said"]]
    return [f"- {name} said: {text}" for name, text in notes if any(word in text for word in TELLING)]
