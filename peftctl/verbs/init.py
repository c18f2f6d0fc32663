"""`peftctl init`: a first recipe, every setting with its reason."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from peftctl import recipe as recipes
from peftctl.config import document as documents
from peftctl.config.home import expanded
from peftctl.config.near import did_you_mean
from peftctl.data.dataset import Source
from peftctl.data.file import Row
from peftctl.data.sources import read as read_rows
from peftctl.engine.method import Method
from peftctl.errors import RecipeError
from peftctl.methods import METHODS
from peftctl.models.folder import read_config, weight_files
from peftctl.models.head import CAUSAL, SEQ2SEQ
from peftctl.models.known import known as known_models
from peftctl.models.known import parameters as count
from peftctl.models.source import local, resolve
from peftctl.recipe import PRESETS
from peftctl.training import filesystem, storage
from peftctl.verbs import advice
from peftctl.verbs.advice import Known, Setting, TaskName
from peftctl.verbs.events import Listen, silent, speaker

HERE = Path(".")
COMMENT = 46
"""Column of the reasons."""

QUERY_AND_VALUE = {
    ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt"): ["q_proj", "v_proj"],
    ("t5", "mt5"): ["q", "v"],
    ("bert", "roberta"): ["query", "value"],
}
"""By `model_type`; where query and value share one matrix, there is no choice between them."""

SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(x\d+(?:\.\d+)?)?([bm])(?![a-z0-9])", re.IGNORECASE)
"""`7b`, `135M` or `8x7B` in the name of a model."""


def init(
    target: Path,
    *,
    model: str,
    data: str,
    task: str = "chat",
    method: str | None = None,
    preset: str = "balanced",
    listen: Listen = silent,
) -> Path:
    """Write a commented recipe to `target` and return it.

    Args:
        model: hub id, folder or .gguf file.
        data: training rows; they are counted when they are there already.
        task, preset: names in `advice.TASKS` and `advice.PRESETS`, or `balanced`.
        method: a name that recipes know; what suits the size of the model when left out.

    Raises:
        RecipeError: an unknown name, a method that needs more than this asks for, or a file in the way.
        DataError: rows of which none can be read.
    """
    name, chosen = advice.check(task, preset)
    if target.exists():
        raise RecipeError(f"{target}: exists already", "name another file, or remove it first")
    rows = counted(data, listen)
    shape = shape_of(model)
    known = Known(
        task=name,
        rows=rows,
        parameters=parameters(model),
        query_and_value=query_and_value(shape),
        preset=chosen,
        trained_as=(trains := trained_as(name, shape)),
        longest=min(2048, shape.get("max_position_embeddings", 2050) - 2) if trains == "classification" else 2048,
    )
    kind = Setting(method, "as asked for") if method else advice.method(known)
    text = "\n".join(lines(known, kind, seen_from(target, model), seen_from(target, data), target)) + "\n"
    recipes.build(documents.parse(text, str(target)), target.parent)  # what is written must read back
    filesystem.make_folder(target.parent)
    storage.replace_atomically(target, text.encode())
    return target


def seen_from(target: Path, path: str) -> str:
    """A path in the recipe `target`, whose folder its paths start from; what is not there may be a hub id."""
    return os.path.relpath(path, target.parent) if target.parent != HERE and os.path.exists(path) else path


def lines(known: Known, kind: Setting, model: str, data: str, target: Path) -> Iterator[str]:
    """The recipe, line by line."""
    name = str(kind.value)
    found = method_of(name)
    block, clashes = {field.name for field in dataclasses.fields(found)}, found.clashes
    rank, low_rank = advice.rank(known), "r" in block and "alpha" in block
    yield f"# {known.task.capitalize()} with {model}, {name}."
    yield "#"
    yield f"#   peftctl data {target}     # look at the rows, and at what is trained of them"
    yield f"#   peftctl train {target}"
    yield "model:"
    yield line("name_or_path", model, known.size, 1)
    yield "method:"
    yield line("type", name, kind.why, 1)
    if low_rank:
        yield line("r", rank.value, rank.why, 1)
        yield line("alpha", *advice.alpha(known), 1)
    if "dropout" in block:
        yield line("dropout", *advice.dropout(known), 1)
    if low_rank and "target_modules" in block:
        yield line("target_modules", *advice.targets(known), 1)
    elif not low_rank:
        yield f"  # `peftctl methods {name}` lists its fields"
    yield "dataset:"
    yield line("train", data, f"{known.rows:,} rows" if known.rows else "put your rows here", 1)
    yield line("eval", {"split": 0.05}, "rows held out; better: a file of its own", 1)
    if known.task == "text":
        yield line("on_long", "split", "long texts are trained whole, in pieces", 1)
    elif not known.trained_as:
        yield "  # chat_template: chatml                      # where the tokenizer has none of its own"
    yield line("max_length", known.longest, "tokens; longer rows are cut and counted", 1)
    yield "trainer:"
    if known.trained_as:
        yield line("task", known.trained_as, "this kind of model has a task of its own", 1)
    yield line("epochs", *advice.epochs(known), 1)
    yield line("batch_size", *advice.batch_size(known), 1)
    yield line("micro_batch_size", 4, "sequences per forward: less saves memory, the result is the same", 1)
    if low_rank:
        yield line("learning_rate", *advice.learning_rate(known), 1)
    if (known.parameters or advice.LARGE) > 3_000_000_000 and "trainer.gradient_checkpointing" not in clashes:
        yield line("gradient_checkpointing", True, "a quarter slower, far less memory", 1)
    if name == "qlora":
        yield line("optimizer", "paged_adamw_8bit", "its state in 8 bits, out of the way when memory is short", 1)
    if known.task == "classification" and known.trained_as != "classification":
        yield "eval:"
        yield "  metrics: [loss]"
        yield "  # labels: [positive, negative]               # the answers to choose from: measures accuracy"
    yield line("output", f"runs/{target.stem}", "the run folder, below where you are", 0)


def line(key: str, value: object, why: str, depth: int) -> str:
    """One setting and its reason."""
    number = isinstance(value, str) and re.fullmatch(r"\de-\d", value)  # 2e-4 stays as people write it
    shown = value if number else yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n")
    return f"{'  ' * depth + f'{key}: {str(shown).strip()}':<{COMMENT}} # {why}"


def method_of(name: str) -> type[Method]:
    """The method. Raises RecipeError for an unknown one, and for one that needs what nobody was asked."""
    names = {**METHODS, **{preset: METHODS[real] for preset, (real, _) in PRESETS.items()}}
    if name not in names:
        raise RecipeError(f"method: unknown: `{name}`", did_you_mean(name, names) or "`peftctl methods` lists them")
    needed = [f.name for f in dataclasses.fields(names[name]) if f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        text = f"method: `{name}` needs {', '.join(f'`{each}`' for each in needed)}, which nothing here can guess"
        raise RecipeError(text, f"start from `peftctl recipes copy methods/{name}`")
    return names[name]


def counted(data: str, listen: Listen) -> int | None:
    """How many rows `data` has; None when no file is there yet, or the rows are on the hub."""
    if not (HERE / expanded(data)).exists() and not any(mark in data for mark in "*?["):
        return None
    met = list(map(type, read_rows(Source(path=data), HERE)))
    good = sum(issubclass(kind, Row) for kind in met)
    if good < len(met):
        speaker(listen)(f"{data}: {len(met) - good} of {len(met)} rows cannot be read: `peftctl data` shows them")
    return good


def parameters(model: str) -> int | None:
    """Of the base model: from its files where they are at hand, else from what is known of it, or its name; or None."""
    if isinstance(path := resolve(model), Path) and path.is_dir():
        return sum(file.stat().st_size for file in weight_files(path, model)) // 2  # nearly all are stored in 16 bits
    if model in known_models():
        return count(known_models()[model])
    found = SIZE.search(Path(model).name)
    if found is None:
        return None
    number, experts, unit = found.groups()
    return round(float(number) * float((experts or "x1")[1:]) * (1e9 if unit in "bB" else 1e6))


def shape_of(model: str) -> Mapping[str, Any]:
    """The configuration of a model that is at hand or well known; empty for others."""
    if isinstance(resolve(model), Path):
        return read_config(local(model, weights=False), model)
    return known_models().get(model, {})


def query_and_value(shape: Mapping[str, Any]) -> list[str] | None:
    """The names of its query and value matrices; None when nothing tells, or they are in one."""
    return next((names for kinds, names in QUERY_AND_VALUE.items() if shape.get("model_type") in kinds), None)


def trained_as(task: TaskName, shape: Mapping[str, Any]) -> str | None:
    """The task of a recipe where that is not to train a causal language model."""
    if task in ("preferences", "captioning"):
        return "dpo" if task == "preferences" else "captioning"
    from transformers import AutoConfig

    kind = shape.get("model_type")
    if kind is None:
        return None
    parsed = AutoConfig.for_model(**shape)
    if SEQ2SEQ.fits(parsed, shape.get("architectures")) and not CAUSAL.fits(parsed, shape.get("architectures")):
        return "seq2seq"
    if task == "classification" and not CAUSAL.fits(parsed, shape.get("architectures")):
        return "classification"
    return None
