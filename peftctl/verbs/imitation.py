"""A recipe made small enough to run anywhere in seconds: a tiny model of its architecture, few rows, few steps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import torch

from peftctl.config.home import expanded
from peftctl.config.write import dump
from peftctl.data.dataset import Dataset, Source, Sources, Split
from peftctl.data.sources import TEXTS, listed
from peftctl.engine.attach import attach, trained
from peftctl.engine.disk import method_in, save
from peftctl.engine.method import Method
from peftctl.engine.peft_config import CONFIG
from peftctl.evaluation.gate import BASE
from peftctl.methods import METHODS
from peftctl.models import base as models
from peftctl.models import tiny
from peftctl.models.architecture import architecture
from peftctl.models.head import DIFFUSION
from peftctl.models.quiet import Say, quiet
from peftctl.recipe import Recipe
from peftctl.verbs.imitated_pipeline import draw_pictures, imitated, smaller
from peftctl.verbs.made_up import made_up

ROWS = 8
STEPS = 3
BATCH = 4

LAYER = re.compile(r"\.(\d+)\.")
"""The number of a layer in the name of a module."""


@dataclass(frozen=True)
class Imitation:
    """The small recipe, and what was made for it below `folder`; each replacement is said in a line."""

    folder: Path
    say: Say

    def of(self, recipe: Recipe) -> Recipe:
        """The small recipe. Raises ModelError when the architecture of its model is not known here."""
        draws = recipe.trainer.task.head is DIFFUSION
        model = imitated(recipe, self.folder / "model", self.say) if draws else self.model(recipe)
        small = replace(
            recipe,
            model=replace(recipe.model, name_or_path=str(model), revision=None, device="cpu", **self.precision(recipe)),
            dataset=self.dataset(recipe),
            trainer=replace(recipe.trainer, **self.training(recipe)),
            eval=replace(recipe.eval, **self.measuring(recipe)),
        )
        return replace(small, method=self.method(small))

    def model(self, recipe: Recipe) -> Path:
        """A tiny model of the architecture of the recipe's."""
        config = architecture(recipe.model.name_or_path, recipe.model.revision)
        layers, width = fewest_layers(recipe.method, config), narrowest(recipe.method, config)
        self.say(f"model: `{recipe.model.name_or_path}` as a random `{config.model_type}`, {layers} layers of {width}")
        return tiny.write(config, self.folder / "model", seed=recipe.seed, layers=layers, width=width)

    def precision(self, recipe: Recipe) -> dict[str, Any]:
        """Fields of `model` that a CPU has not."""
        changed: dict[str, Any] = {}
        if recipe.model.attention == "flash_attention_2":
            changed["attention"] = "auto"
        if recipe.model.dtype == "float16":
            changed["dtype"] = "float32"
        self.tell("model", recipe.model, {**changed, "device": "cpu"})
        return changed

    def training(self, recipe: Recipe) -> dict[str, Any]:
        """Fields of `trainer` for a few small steps."""
        trainer = recipe.trainer
        changed: dict[str, Any] = {
            "steps": STEPS,
            "batch_size": min(trainer.batch_size, BATCH),
            "micro_batch_size": min(trainer.micro_batch_size, BATCH // 2),
            "save_every": 1,
            "eval_every": STEPS,
            "compile": False,
        }
        if trainer.optimizer not in ("adamw", "sgd", "adafactor"):
            changed["optimizer"] = "adamw"
        self.tell("trainer", trainer, changed)
        task = smaller(trainer.task) if trainer.task.head is DIFFUSION else trainer.task.imitated()
        gone = [key.name for key in fields(task) if getattr(trainer.task, key.name) and not getattr(task, key.name)]
        if gone:
            self.say(f"trainer.task: without {', '.join(gone)}")
        return {**changed, "epochs": 1.0, "keep": STEPS, "task": task}

    def measuring(self, recipe: Recipe) -> dict[str, Any]:
        """Fields of `eval` for a few rows; a gate that compares with another run has nothing to compare with."""
        asked = recipe.eval
        gates = {key: gate for key, gate in asked.gates.items() if gate.against in (None, BASE)}
        for key in asked.gates.keys() - gates.keys():
            self.say(f"eval.gates.{key}: compares with another run: left out")
        few = {"max_rows": BATCH, "max_new_tokens": 8, "batch_size": BATCH}
        changed = {key: min(getattr(asked, key) or limit, limit) for key, limit in few.items()}
        self.tell("eval", asked, changed)
        return {**changed, "samples": min(asked.samples, 1), "gates": gates}

    def tell(self, block: str, before: Any, changed: Mapping[str, Any]) -> None:
        """One line for a block's settings that differ."""
        words = [f"{key} {value}" for key, value in changed.items() if getattr(before, key) != value]
        if words:
            self.say(f"{block}: {', '.join(words)}")

    def dataset(self, recipe: Recipe) -> Dataset:
        """The first rows of what is here, made-up rows for what is not."""
        dataset = recipe.dataset
        held_out = dataset.eval
        if isinstance(held_out, Split):
            held_out = Split(split=max(held_out.split, 2 / ROWS))
        elif isinstance(held_out, dict):
            held_out = {name: self.sources(spec, recipe, f"eval.{name}") for name, spec in held_out.items()}
        elif held_out is not None:
            held_out = self.sources(held_out, recipe, "eval")
        on_long = "truncate" if dataset.on_long == "error" else dataset.on_long
        return replace(
            dataset,
            train=self.sources(dataset.train, recipe, "train"),
            eval=held_out,
            max_length=tiny.POSITIONS // 2,
            on_long=on_long,
            max_skipped=1.0,
        )

    def sources(self, spec: Sources, recipe: Recipe, name: str) -> list[str | Source]:
        """The sources of `spec`, each of a few rows."""
        return [self.source(source, recipe, f"{name}-{n}") for n, source in enumerate(listed(spec), 1)]

    def source(self, source: Source, recipe: Recipe, name: str) -> Source:
        """A few rows of what is here, or a made-up file in its place; `name` is for that file."""
        if here(source.path):
            return replace(source, max_rows=min(source.max_rows or ROWS, ROWS))
        wanted = source.format or recipe.dataset.format
        kind = Path(source.path.lower().removesuffix(".gz")).suffix
        texts = kind in TEXTS
        path = self.folder / f"{name}{kind if texts else '.jsonl'}"
        task = recipe.trainer.task
        wanted = task.form if wanted == "auto" else wanted
        rows = made_up("text" if texts else wanted, recipe.eval.labels or task.head.labels, ROWS)
        if wanted == "image_text":
            draw_pictures(self.folder, rows)
        lines = [row["text"] + "\n\n" if texts else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.say(f"data: `{source.path}` is not here: {len(rows)} made-up rows")
        by = "paragraph" if texts and source.sample_by == "document" else source.sample_by
        local: dict[str, Any] = {"split": "train", "subset": None, "streaming": False, "sample_by": by, "columns": {}}
        return replace(source, path=str(path), max_rows=ROWS, **local)

    def method(self, recipe: Recipe) -> Method:
        """The method with adapters of the tiny model in place of the real one's, and its schedule left to the run."""
        method: Method = recipe.method
        changed: dict[str, Any] = {}
        if method.init_from:
            changed["init_from"] = self.adapter(recipe, replace(method, init_from=None), "init_from")
        if method.folders:
            known = [method_in(folder) if (folder / CONFIG).is_file() else None for folder in map(Path, method.folders)]
            changed["adapters"] = [self.adapter(recipe, one, f"part-{n}") for n, one in enumerate(known, 1)]
        for key in ("tinit", "tfinal", "deltaT", "total_step", "start_steps"):
            value = getattr(method, key, None)
            if value is not None:
                changed[key] = 1 if key == "start_steps" else None
        if changed:
            self.say(f"method: {', '.join(changed)} for the tiny model and its {STEPS} steps")
        return replace(method, **changed)

    def adapter(self, recipe: Recipe, method: Method | None, name: str) -> str:
        """A folder with an adapter of the tiny model that does something; a bottleneck where `method` is not known."""
        with quiet(), torch.no_grad():
            base = models.load(recipe.model, recipe.trainer.task.head)
            attach(base.model, method or METHODS["bottleneck"]())
            torch.manual_seed(recipe.seed)
            for parameter in trained(base.model).values():
                parameter.add_(0.02 * torch.randn_like(parameter))
            return str(save(base.model, self.folder / name))


def fewest_layers(method: Method, config: Any) -> int:
    """Layers that the method names must be there, as far as they are in the real model."""
    named = [int(number) for text in texts(dump(method)) for number in LAYER.findall(f".{text}.")]
    chosen = getattr(method, "layers_to_transform", None)
    named += chosen if isinstance(chosen, list) else [chosen] if isinstance(chosen, int) else []
    named.append(getattr(method, "top", None) or 0)
    real = getattr(config, "num_hidden_layers", None) or 2
    return max(2, min(max(named) + 1, real))


def texts(value: Any) -> Iterator[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for part in item for text in texts(part))
    elif isinstance(value, list):
        yield from (text for item in value for text in texts(item))


def narrowest(method: Method, config: Any) -> int:
    """A width that the method's rank fits in and its block sizes divide, where they divide that of the real model."""
    sizes = {field.name: getattr(method, field.name) for field in fields(method)}
    ranks = [value for key in ("r", "init_r", "reduction_factor") if isinstance(value := sizes.get(key), int)]
    divisors = [value for key in ("block_size", "group_size", "k") if isinstance(value := sizes.get(key), int)]
    hidden = getattr(config, "hidden_size", 0)
    step = math.lcm(64, *(value for value in divisors if hidden % value == 0 and value <= 512))
    return step * math.ceil(min(max(128, 2 * max(ranks, default=1)), 1024) / step)


def here(path: str) -> bool:
    """Whether rows can be read without a network."""
    if expanded(path).exists():
        return True
    return has_magic(path) and bool(glob(str(expanded(path)), recursive=True))
