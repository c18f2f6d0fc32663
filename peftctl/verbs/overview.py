"""What is about to happen, in five lines; with `--dry-run` also which modules carry an adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.data.batches import Packing
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import ends_with
from peftctl.engine.attach import adapters_of, trained
from peftctl.engine.disk import on_disk
from peftctl.models.base import Base
from peftctl.recipe import Recipe, method_name
from peftctl.training.trainer import peak_rate, total_steps
from peftctl.verbs.events import Listen
from peftctl.verbs.rows import Rows


@dataclass(frozen=True)
class Overview:
    """The facts of a run, known before its first step."""

    recipe: Recipe
    base: Base
    rows: Rows
    folder: Path
    adapters: dict[str, Adapter]
    trainable: int
    """Parameters that train."""
    total: int
    """Parameters of base and adapters; those stored in 4 bits count each."""
    adapter_bytes: int
    """Size of the adapter on disk, without its few hundred bytes of header."""
    steps: int
    packing: Packing | None
    """How rows are packed; None when they are padded."""

    @classmethod
    def of(cls, recipe: Recipe, base: Base, rows: Rows, folder: Path, packing: Packing | None) -> Overview:
        """That of a recipe whose adapters are attached to `base`."""
        adapters = adapters_of(base.model, "default")
        parameters = trained(base.model).values()
        return cls(
            recipe=recipe,
            base=base,
            rows=rows,
            folder=folder,
            adapters=adapters,
            trainable=sum(p.numel() for p in parameters),
            total=base.model.num_parameters(),
            adapter_bytes=sum(t.numel() * t.element_size() for t in on_disk(adapters).values()),
            steps=total_steps(recipe.trainer, rows.train.parts),
            packing=packing,
        )

    def record(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "trainable_percent": round(100 * self.trainable / self.total, 4),
            "adapter_bytes": self.adapter_bytes,
            "modules": self.matches(),
            "steps": self.steps,
            "packed": self.packing is not None,
            "rows": self.rows.counts(),
            "tokens": self.rows.train.ledger.tokens,
            "trained_tokens": self.rows.train.ledger.trained_tokens,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.base.device),
        }

    def matches(self) -> dict[str, int]:
        """How many modules each target entry matched; by last name when the target is a pattern or a shorthand."""
        targets = getattr(self.recipe.method, "target_modules", None)
        names = list(self.adapters)
        if isinstance(targets, list):
            return {entry: sum(ends_with(name, entry) for name in names) for entry in targets}
        return dict(Counter(last_name(name) or "the whole model" for name in names))

    def tell(self, listen: Listen, details: bool) -> None:
        """Say it."""
        recipe, train = self.recipe, self.rows.train
        trainer, method = recipe.trainer, recipe.method
        dtype = str(self.base.dtype).removeprefix("torch.")
        quantised = "" if recipe.model.quantization == "none" else f", weights in {recipe.model.quantization}"
        share = f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.2%})"
        sizes = [f"{len(found):,} {name}".rstrip() for name, found in self.rows.eval_rows.items()]
        held = f", {' and '.join(sizes)} to evaluate on" if sizes else ""
        tokens = f"{train.ledger.tokens:,} tokens, {train.ledger.trained_tokens:,} trained"
        rate = peak_rate(trainer, method)
        laid = ", packed" if self.packing else ""
        listen(
            {
                "event": "plan",
                "rows": [
                    ["model", f"{recipe.model.name_or_path}, {dtype} on {self.base.device}{quantised}"],
                    ["method", f"{method_name(method)} on {counted(len(self.adapters))}: {share}"],
                    [
                        "data",
                        f"{len(train.rows):,} rows, {tokens}{held}",
                    ],
                    [
                        "training",
                        f"{self.steps:,} steps of {trainer.batch_size} rows{laid}, {trainer.optimizer} at {rate:g}",
                    ],
                    ["output", f"{self.folder}, adapter of {self.adapter_bytes / 2**20:.1f} MiB"],
                ],
            }
        )
        if details:
            rows = [[entry, str(count)] for entry, count in self.matches().items()]
            listen({"event": "table", "title": "adapted modules", "columns": ["target", "modules"], "rows": rows})


def last_name(module: str) -> str:
    """The last part of a module's name, with that before it where it is a number: `to_out.0`."""
    rest, _, last = module.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{last}" if last.isdigit() else last


def counted(modules: int) -> str:
    """`1 module`, `14 modules`."""
    return f"{modules:,} module{'' if modules == 1 else 's'}"
