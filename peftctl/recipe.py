"""The recipe: the table of contents of a run. Each block stands beside the code that reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import PlainValidator, WithJsonSchema

from peftctl import bundled
from peftctl.config import document as documents
from peftctl.config import variant
from peftctl.config.annotation import at, hints, metadata
from peftctl.config.block import LOCATED, Block, Natural
from peftctl.config.check import check
from peftctl.config.document import Document
from peftctl.config.home import expanded
from peftctl.config.near import did_you_mean
from peftctl.config.write import dump as plain
from peftctl.config.write import to_yaml
from peftctl.data.dataset import Dataset, Source, Sources, Split
from peftctl.data.sources import FILES as DATA_FILES
from peftctl.engine.method import Method, name_of
from peftctl.errors import RecipeError
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.gate import BASE, split_key
from peftctl.exports.export import Export
from peftctl.methods import METHODS
from peftctl.models.base import Model
from peftctl.tasks import TASKS
from peftctl.tasks import task as tasks
from peftctl.training.trainer import Trainer

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"qlora": ("lora", {"model": {"quantization": "nf4"}})}
"""Method types that stand for another one and for settings elsewhere, where the recipe does not say otherwise."""


CHATS = {"system": None, "train_on": "assistant", "chat_template": "tokenizer"}
"""Keys of `dataset` that are about conversations, and their defaults."""


def read_method(value: Any) -> Method:
    """A `method` block: its `type` picks the method, the other keys are that method's fields."""
    return variant.read(value, Method, METHODS, "method", also=PRESETS)


@dataclass(frozen=True, kw_only=True)
class Recipe(Block):
    """One fine-tuning, from model and data to what is written at the end."""

    model: Model
    """The base model."""
    method: Annotated[Any, PlainValidator(read_method), WithJsonSchema({"$ref": "#/$defs/method"})]
    """What is trained: `type` names the method, the other keys are its fields (`peftctl methods NAME`)."""
    dataset: Dataset
    """The rows."""
    trainer: Trainer = field(default_factory=Trainer)
    """How to train."""
    eval: Evaluation = field(default_factory=Evaluation)
    """What to measure."""
    export: Export = field(default_factory=Export)
    """What to write at the end."""
    output: str
    """Run folder, below the working directory; elsewhere only with `--output`."""
    seed: Natural = 0
    """Seed of the order of rows, of dropout and of the adapter's start."""

    def __post_init__(self) -> None:
        parts = Path(self.output).parts
        if not parts or Path(self.output).is_absolute() or ".." in parts or self.output.startswith("~"):
            raise ValueError(
                f"output `{self.output}` does not lie below the working directory; hint: use `--output` for that"
            )


def read(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or the bundled one of that name, with `key.key=value` overrides.

    Its paths are then relative to the working directory, or absolute. Raises RecipeError with all that is wrong.
    """
    path = Path(name_or_path)
    if not os.path.exists(path) and str(name_or_path).removesuffix(".yaml") in bundled.names():
        path = bundled.path(str(name_or_path))
    return build(documents.read(path), path.parent, overrides)


def read_run(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The resolved recipe of a run folder."""
    return build(documents.read(folder / "recipe.yaml"), folder, overrides)


def run_folder(recipe: Recipe, output: str | Path | None = None) -> Path:
    """Where a run is written: `output`, which its user typed, wherever that is; else the recipe's.

    Raises RecipeError where a link leads that out of the working directory: who wrote the recipe may have made it.
    """
    if output:
        return Path(output)
    if not Path(os.path.realpath(recipe.output)).is_relative_to(os.path.realpath(".")):
        text = f"output: `{recipe.output}` does not lie below the working directory: a link leads out of it"
        raise RecipeError(text, "use `--output` for that")
    return Path(recipe.output)


def coerce(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe in whatever form Python code has it."""
    if isinstance(recipe, Recipe):
        return replace(recipe, eval=recipe.eval.of(recipe.trainer.task))
    if isinstance(recipe, Mapping):
        return build(documents.parse(to_yaml(dict(recipe)), "recipe"), Path("."))
    return read(recipe)


def build(document: Document, root: Path, overrides: Iterable[str] = ()) -> Recipe:
    """A document checked, its preset expanded, its paths located: from `root`, those of overrides from here."""
    document = document.with_overrides(opened(overrides, document.data))

    def root_of(*keys: str | int) -> Path:
        return Path(".") if document.spot(keys).value.source else root

    document = document.with_overrides(expansion(document.data))
    recipe = check(Recipe, document)
    clashes = [
        document.problem(tuple(key.split(".")), f"does not go with `{method_name(recipe.method)}`: {why}", way_out)
        for key, (why, way_out) in recipe.method.clashes.items()
        if reduce(getattr, key.split("."), cast(Any, recipe)) not in (None, False, "none")
    ]
    task = recipe.trainer.task
    if refused := task.refuses(recipe.method):
        clashes.append(document.problem(("trainer", "task"), f"`{tasks.name_of(task)}` {refused[0]}", refused[1]))
    clashes += [
        document.problem(
            ("dataset", key), f"means nothing to `{tasks.name_of(task)}`, whose rows are no chats", "remove it"
        )
        for key, usual in CHATS.items()
        if not task.talks and getattr(recipe.dataset, key) != usual
    ]
    clashes += [document.problem(("eval", *keys), *told) for keys, *told in recipe.eval.unmeasurable(task)]
    clashes += [
        document.problem(("eval", "gates", key), "no evaluation rows have that name", hint)
        for key, hint in unknown_sets(recipe).items()
    ]
    if clashes:
        raise RecipeError.of(clashes)
    return located(replace(recipe, eval=recipe.eval.of(task)), root_of)


def opened(overrides: Iterable[str], data: Mapping[str, Any]) -> list[str]:
    """The overrides, where some set fields of a task that is written as its name alone, with that as a mapping."""
    given = list(overrides)
    if not any(override.startswith("trainer.task.") for override in given):
        return given
    trainer = data.get("trainer")
    task = trainer.get("task") if isinstance(trainer, Mapping) else None
    named = [f"trainer.task={{type: {task}}}"] if isinstance(task, str) else []
    return named + [re.sub(r"^trainer\.task=(\w+)$", r"trainer.task={type: \1}", override) for override in given]


def unknown_sets(recipe: Recipe) -> dict[str, str]:
    """The gates that name a set of evaluation rows which is not there, each with a hint."""
    names = [name for name in recipe.dataset.eval_sets if name]
    said = {key: split_key(key)[0] for key in recipe.eval.gates}
    listed = f"sets of `dataset.eval`: {', '.join(names)}" if names else "a metric alone holds for all rows"
    return {key: did_you_mean(name, names) or listed for key, name in said.items() if name and name not in names}


def expansion(data: Mapping[str, Any]) -> list[str]:
    """The overrides that a preset stands for; what the recipe says itself wins."""
    method = data.get("method")
    kind = method.get("type") if isinstance(method, Mapping) else None
    if not isinstance(kind, str) or kind not in PRESETS:
        return []
    real, settings = PRESETS[kind]
    unsaid = [
        f"{block}.{key}={value}"
        for block, values in settings.items()
        for key, value in values.items()
        if isinstance(data.get(block), Mapping) and key not in data[block]
    ]
    return [f"method.type={real}", *unsaid]


def located(recipe: Recipe, root_of: Callable[..., Path], write: Callable[[Path], str] | None = None) -> Recipe:
    """`recipe` with its paths seen from the working directory.

    `root_of(*keys)` is where the path at these keys starts; `write` is the form that paths get.
    """
    write = write or shortest

    def here(text: str, *keys: str | int) -> str:
        path = root_of(*keys) / expanded(text)
        local = text.startswith((".", "/", "~")) or text.lower().endswith(FILES) or "*" in text or os.path.exists(path)
        return write(path) if local else text

    def sources(spec: Sources | Split | Mapping[str, Sources] | None, *keys: str | int) -> Any:
        if isinstance(spec, list):
            return [sources(part, *keys, index) for index, part in enumerate(spec)]
        if isinstance(spec, Mapping):
            return {name: sources(part, *keys, name) for name, part in spec.items()}
        if isinstance(spec, Source):
            return replace(spec, path=here(spec.path, *keys, "path"))
        return here(spec, *keys) if isinstance(spec, str) else spec

    def marked(value: Any, *keys: str | int) -> Any:
        """What stands at `keys` of the method: located where its annotation says that it is a path."""
        if isinstance(value, list):
            return [marked(item, *keys, index) for index, item in enumerate(value)]
        path = any(LOCATED in metadata(annotation) for annotation in at(kind, keys[1:]))
        return here(value, *keys) if path and isinstance(value, str) else value

    dataset, method, model = recipe.dataset, recipe.method, recipe.model
    kind: type = type(method)
    gates = {
        key: replace(gate, against=here(gate.against, "eval", "gates", key, "against"))
        if gate.against not in (None, BASE)
        else gate
        for key, gate in recipe.eval.gates.items()
    }
    dataset = replace(
        dataset,
        train=sources(dataset.train, "dataset", "train"),
        eval=sources(dataset.eval, "dataset", "eval"),
    )
    if Path(dataset.chat_template).suffix:
        dataset = replace(dataset, chat_template=here(dataset.chat_template, "dataset", "chat_template"))
    method = replace(method, **{name: marked(getattr(method, name), "method", name) for name in hints(kind)})
    model = replace(model, name_or_path=here(model.name_or_path, "model", "name_or_path"))
    return replace(recipe, model=model, method=method, dataset=dataset, eval=replace(recipe.eval, gates=gates))


FILES = (*DATA_FILES, ".gguf")
"""Endings that no hub id has: such a text is a path even when nothing is there."""


def shortest(path: Path) -> str:
    """`path` from the working directory when it lies below it, else absolute."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with absolute paths, so that it reads the same from anywhere."""
    fixed = located(recipe, lambda *keys: Path("."), os.path.abspath)
    method = variant.plain(fixed.method, method_name(fixed.method))
    trainer = {**plain(fixed.trainer), "task": tasks.plain(fixed.trainer.task)}
    return to_yaml({**plain(fixed), "method": method, "trainer": trainer})


def method_name(method: Method) -> str:
    """The key of a method in recipes."""
    return name_of(method)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ, apart from where they write."""
    first, second = (flat(documents.parse(dump(recipe), "recipe").data) for recipe in (one, other))
    keys = sorted(first.keys() | second.keys())
    return [key for key in keys if key != "output" and first.get(key) != second.get(key)]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    items: dict[str, Any] = {}
    for key, item in value.items():
        items |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return items


def schema() -> dict[str, Any]:
    """A JSON Schema of recipes, for editors."""
    from peftctl.config.schema import schema as schema_of

    whole = schema_of(Recipe, "peftctl recipe")
    shared = whole.setdefault("$defs", {})
    methods = {**METHODS, **{preset: METHODS[real] for preset, (real, _) in PRESETS.items()}}
    for name, kinds in (("method", methods), ("task", TASKS)):
        variants, definitions = variant.schema(kinds)
        shared |= {**definitions, name: {"oneOf": variants}}
    shared["task"]["oneOf"].insert(0, {"enum": sorted(TASKS)})
    return whole
