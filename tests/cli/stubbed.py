"""The command line in a process of its own, with `merge` replaced by what MODE says: python stubbed.py MODE WORDS..."""

from __future__ import annotations

import sys
import time
from types import ModuleType

mode = sys.argv.pop(1)


def merge(target, output, *, into, base, listen):
    if mode == "bug":
        raise ZeroDivisionError("a bug")
    if mode == "socket":
        raise BrokenPipeError(32, "a socket")
    for number in range(300):
        listen({"event": "note", "text": f"note {number}"})
    if mode == "steps":
        for step in range(1, 41):
            time.sleep(0.03)
            figures = {"step": step, "steps": 40, "epoch": step / 40, "loss": 1 / step, "learning_rate": 1e-4}
            listen({"event": "step", **figures, "tokens": 100, "seconds": 0.03, "memory": 2**30})
    if mode == "wait":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)
    return {"path": target}


module = ModuleType("peftctl.verbs.merge")
module.merge = merge
sys.modules[module.__name__] = module

from peftctl.cli import main  # noqa: E402

sys.exit(main())
