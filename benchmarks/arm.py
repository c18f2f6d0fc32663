"""One arm in a process of its own: reads a job from standard input, writes its outcome to the job's file."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from benchmarks.job import Clock, Job

KINDS = {
    "ours": "benchmarks.ours",
    "loop": "benchmarks.loop",
    "trainer": "benchmarks.trainer",
    "sft": "benchmarks.trainer",
}


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    clock = Clock(job)
    extra = import_module(KINDS[job.kind]).run(job, clock)
    job.write({**clock.outcome(), **(extra or {})})


if __name__ == "__main__":
    main()
