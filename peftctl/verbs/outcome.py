"""What came of a run."""

from __future__ import annotations

from typing import Any

from peftctl.planning.estimate import Estimate
from peftctl.training.memory import peak_memory
from peftctl.training.progress import Progress
from peftctl.verbs.events import Listen
from peftctl.verbs.forecast import compared
from peftctl.verbs.overview import Overview
from peftctl.verbs.run_folder import RunFolder


def outcome(
    folder: RunFolder, plan: Overview, progress: Progress, seconds: float, foreseen: Estimate | None, listen: Listen
) -> dict[str, Any]:
    """What a finished run is worth telling."""
    size = sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors"))
    memory = peak_memory()
    if foreseen is not None:
        said = {"peak": memory, "predicted": foreseen.peak}
        folder.write_json(folder.provenance, {**folder.read_provenance(), "memory": said})
    record = {
        "path": str(folder.path),
        "adapter": str(folder.adapter),
        "steps": progress.step,
        "best_step": progress.best_step,
        "eval_loss": progress.best_loss,
        "tokens": progress.tokens,
        "seconds": round(seconds, 1),
        "training_seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds) if progress.seconds else None,
        "peak_memory": memory,
        "predicted_memory": foreseen.peak if foreseen else None,
        "adapter_bytes": size,
        "trainable_parameters": plan.trainable,
    }
    rows = [
        ["adapter", f"{folder.adapter}  ({size / 2**20:.1f} MiB)"],
        ["steps", f"{progress.step}" + (f", best {progress.best_step}" if progress.best_step else "")],
        ["time", f"{seconds:.0f} s, {record['tokens_per_second']} tokens/s in training"],
        ["memory", compared(memory, foreseen)],
    ]
    listen({"event": "trained", "rows": rows})
    return record
