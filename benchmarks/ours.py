"""The arm of peftctl: `peftctl.train` with a recipe, as users call it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peftctl
from benchmarks.job import Clock, Job


def run(job: Job, clock: Clock) -> dict[str, Any]:
    """Train; the clock stops at every step event, so journal and listeners are in the time. Returns what was said."""
    said: list[str] = []
    inner: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock.step(event["loss"], event["tokens"])
            inner.append(event["seconds"])
        elif not clock.losses:
            clock.ready()
            if event["event"] in ("note", "warning"):
                said.append(str(event["text"]))

    with tempfile.TemporaryDirectory() as folder:
        peftctl.train(recipe(job), output=Path(folder) / "run", listen=listen)
    return {"said": said, "inner": inner}


def recipe(job: Job) -> dict[str, Any]:
    """The job's recipe, with its model, start, sizes and changes."""
    given = job.recipe
    method = {**given["method"], **({"init_from": job.start} if job.start else {})}
    trainer = {
        **given["trainer"],
        "steps": job.steps,
        "batch_size": job.batch,
        "micro_batch_size": job.micro,
        "learning_rate": job.rate,
        "schedule": "constant",
        "warmup": 0.0,
        **job.changes,
    }
    quantization = {"quantization": "nf4"} if job.nf4 else {}
    model = {"name_or_path": job.model, "dtype": "bfloat16", "device": "cpu", **quantization}
    return {**given, "model": model, "method": method, "trainer": trainer, "output": "run"}
