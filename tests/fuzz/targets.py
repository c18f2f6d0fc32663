"""What is fuzzed: all that peftctl reads. A check returns, or raises PeftctlError; whatever else is a failure."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tiny
import tiny_chat
import torch
import yaml
from fuzz import corpora
from fuzz.mutations import INTEGERS, TEXTS, Case, Mutator, changed, safetensors_header, splintered, with_number

import peftctl
from peftctl.cli import answer
from peftctl.cli.console import OBEYED
from peftctl.config import document
from peftctl.data import template
from peftctl.data.dataset import Dataset, Source
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Row
from peftctl.data.mistakes import Mistakes
from peftctl.data.sources import read
from peftctl.errors import DataError, PeftctlError
from peftctl.models.gguf_header import read_header
from peftctl.recipe import build
from peftctl.recipe import read as read_recipe
from peftctl.training import checkpoint


@dataclass(frozen=True)
class Target:
    """One reader, and what it is fed."""

    mutator: Mutator
    check: Callable[[Case], None]
    """Reads a case as peftctl does; returns when it is taken."""
    seconds: float = 1.0
    """CPU time of a case above which it hangs."""


def lay(folder: Path, case: Case) -> None:
    """The files of a case in `folder`, and of the case before only those that it has too."""
    for name in set(os.listdir(folder)) - case.keys():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, data in case.items():
        if "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.write(data)


def adapter(folder: Path) -> Target:
    """adapter_config.json and the tensors beside it, against one tiny Llama that stays bit for bit as it was."""
    corpus = corpora.adapters(folder / "good")
    model = tiny.build("llama")
    before = corpora.weights(model)
    live = dict([*model.named_parameters(), *model.named_buffers()])
    versions = [t._version for t in live.values()]
    shown = folder / "adapter"
    shown.mkdir()
    seen = 0

    def check(case: Case) -> None:
        nonlocal seen
        seen += 1
        lay(shown, case)
        try:
            peftctl.load(model, shown)
            assert hasattr(model, "peft_methods"), "accepted, and nothing is attached"
            peftctl.detach(model)
        finally:
            assert [t._version for t in live.values()] == versions, "the base was written to"
            if seen % 256 == 1:
                now = corpora.weights(model)
                assert now.keys() == before.keys(), "the base has other parts"
                assert all(torch.equal(now[name], before[name]) for name in before), "the base is another one"
            assert not vars(model).get("peft_methods"), "something stayed attached"

    def header(random: Random, case: Case) -> None:
        names = [name for name in case if name.endswith(".safetensors")]
        if names:
            safetensors_header(random, case, random.choice(names))

    def without(random: Random, case: Case) -> None:
        if random.random() < 0.1:
            del case[random.choice(sorted(case))]
        else:
            other = random.choice(corpus)
            name = random.choice(sorted(other))
            case[name] = other[name]

    def config(random: Random, case: Case) -> None:
        name = "adapter_config.json"
        if name in case:
            case[name] = with_key(random, case[name])

    return Target(Mutator(corpus, [header, header, config, without]), check)


def with_key(random: Random, data: bytes) -> bytes:
    """A configuration with a key of HF PEFT's said otherwise, so that strange values meet the keys that are read."""
    try:
        config = json.loads(data)
        key = random.choice(KEYS)
        config[key] = changed(random, [deepcopy(config.get(key))])[:1] or None
        if isinstance(config[key], list) and random.random() < 0.7:
            config[key] = config[key][0]
        return json.dumps(config).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, AttributeError):
        return data


KEYS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save", "peft_type"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "trainable_token_indices", "exclude_modules", "use_dora"),
    *(
        "layers_to_transform",
        "layers_pattern",
        "feedforward_modules",
        "num_virtual_tokens",
        "token_dim",
        "loftq_config",
    ),
    *("num_layers", "encoder_hidden_size", "prefix_projection", "d_initial", "projection_prng_key", "save_projection"),
    *(
        "init_r",
        "target_r",
        "oft_block_size",
        "inference_mode",
        "task_type",
        "base_model_name_or_path",
        "fan_in_fan_out",
    ),
)


def recipe(folder: Path) -> Target:
    """A recipe as `peftctl validate` reads it."""
    corpus = corpora.recipes()
    parsed = [yaml.safe_load(case["recipe.yaml"]) for case in corpus]
    path = folder / "recipe.yaml"

    def check(case: Case) -> None:
        path.write_bytes(case["recipe.yaml"])
        read_recipe(path)

    def values(random: Random, case: Case) -> None:
        value = deepcopy(random.choice(parsed))
        for _ in range(random.choice((1, 1, 2, 3))):
            value = changed(random, value)
        with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
            text = json.dumps(value, ensure_ascii=False) if random.random() < 0.7 else yaml.safe_dump(value)
            case["recipe.yaml"] = text.encode("utf-8", "surrogatepass")

    return Target(Mutator(corpus, [values]), check)


def override(folder: Path) -> Target:
    """`a.b=c`, on a recipe that is right."""
    whole = document.parse(corpora.recipes()[-1]["recipe.yaml"].decode(), "recipe.yaml")
    keys = "model.dtype method.r method.type method.target_modules dataset.train dataset.train.0 dataset.eval.one.path"
    keys += " trainer.task trainer.task.beta trainer.steps eval.gates.loss.max eval.metrics export output seed x.y a"
    values = ["1", "-1", "1e-4", "null", "[a, b]", "{type: lora}", "{a: 1", "&a 1", "*a", "'x", "true", "sft", "a: b"]
    corpus = [{"override": f"{key}={value}".encode()} for key in keys.split() for value in values]

    def check(case: Case) -> None:
        text = case["override"].replace(b"\0", b"").decode("utf-8", "surrogateescape")  # as a command line has it
        build(whole, folder, [text])

    def nasty(random: Random, case: Case) -> None:
        put = random.choice((random.choice(TEXTS), str(random.choice(INTEGERS)), ".", "=", " ", "0", "-1"))
        words = case["override"].decode("utf-8", "replace").partition("=")
        at = random.randrange(3)
        joined = "".join(put if i == at and random.random() < 0.7 else w for i, w in enumerate(words))
        case["override"] = joined.encode("utf-8", "surrogatepass")

    return Target(Mutator(corpus, [nasty]), check)


def data(folder: Path) -> Target:
    """Files of rows in text, and what their rows are taken for."""
    return Target(Mutator(corpora.rows()), rows_check(folder))


def parquet(folder: Path) -> Target:
    """Parquet files."""
    return Target(Mutator(corpora.parquet(folder)), rows_check(folder))


def rows_check(folder: Path) -> Callable[[Case], None]:
    shown = folder / "data"
    shown.mkdir()

    def check(case: Case) -> None:
        lay(shown, case)
        (name,) = case
        source = Source(path=name)
        dataset = Dataset(train=name)
        wrong = None
        for item in read(source, shown):
            place = item.place if isinstance(item, Row) else item.text
            assert place.startswith(name), f"no place: {place!r}"
            if not isinstance(item, Row):
                wrong = DataError.of([item])
        form = format_of(source, dataset, shown, lambda line: None, Mistakes())
        for example in examples(source, form, dataset, shown) if form else ():
            wrong = example if isinstance(example, DataError) else wrong
        if wrong:
            raise wrong

    return check


def gguf(folder: Path) -> Target:
    """The header of a GGUF file."""
    made = [(bytes(file.data), file.spans) for file in corpora.GGUFS]
    path = folder / "model.gguf"

    def check(case: Case) -> None:
        path.write_bytes(case["model.gguf"])
        read_header(path)

    def numbers(random: Random, case: Case) -> None:
        content, spans = random.choice(made)
        case["model.gguf"] = with_number(random, content, spans)

    def header(random: Random, case: Case) -> None:
        content, spans = random.choice(made)
        end = spans[-1][0] + 8
        case["model.gguf"] = splintered(random, content[:end]) + content[end:]

    return Target(Mutator([{"model.gguf": content} for content, _ in made], [numbers, numbers, header]), check)


def chat(folder: Path) -> Target:
    """Chat templates and the conversations that they render. A rendering may take two seconds before it is stopped."""
    tokenizer = tiny_chat.tokenizer()
    texts = [template.find(name, tokenizer, folder, lambda line: None) for name in template.STOPS] + [
        tiny_chat.TEMPLATE
    ]
    corpus = [
        {"chat.jinja": text.encode(), "messages.json": json.dumps(row["messages"]).encode()}
        for text in texts
        for row in corpora.CHATS
    ]

    def check(case: Case) -> None:
        lay(folder, case)
        text = template.find("chat.jinja", tokenizer, folder, lambda line: None)
        messages = json.loads(json.dumps(corpora.CHATS[0]["messages"]))
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(case["messages.json"])
        template.render(spoken(messages), tokenizer, text, "rows.jsonl:1")

    return Target(Mutator(corpus), check, seconds=2.5)


def spoken(value: Any) -> list[dict[str, Any]]:
    """What the reader of rows lets through: mappings with a role, and texts without halves of characters."""
    kept = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    clean = json.loads(json.dumps(kept).replace("\\ud800", ""))
    return [{**item, "role": str(item.get("role"))} for item in clean]


def checkpoints(folder: Path) -> Target:
    """A checkpoint folder, half of the time with a manifest that agrees with what was spoilt."""
    corpus = corpora.checkpoints(folder / "run")
    shown = folder / "step-000002"
    shown.mkdir()

    def check(case: Case) -> None:
        lay(shown, case)
        checkpoint.load(shown)

    def sealed(random: Random, case: Case) -> None:
        name = random.choice([name for name in case if name != "manifest.json"])
        if name.endswith(".safetensors") and random.random() < 0.6:
            safetensors_header(random, case, name)
        else:
            case[name] = Mutator([{name: case[name]}]).case(random)[name]
        listed = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in case.items()
            if name != "manifest.json"
        }
        case["manifest.json"] = json.dumps({"format": 1, "files": listed}).encode()

    return Target(Mutator(corpus, [sealed]), check)


def words(folder: Path) -> Target:
    """Command lines that read, in a folder where nothing must appear."""
    here = folder / "here"
    corpora.adapters(here)
    (here / "good.yaml").write_bytes(corpora.recipes()[-1]["recipe.yaml"])
    listing = sorted(os.listdir(here))
    lines = (
        "validate good.yaml|validate good.yaml seed=1 --json|schema|methods|methods lora|tasks|tasks dpo|recipes"
        "|recipes show smollm2-lora|adapters inspect 0|adapters inspect 0 --json|adapters diff 0 1|--version|--help|-h"
        "|validate|methods nothing|adapters|adapters inspect nowhere|train --help|merge --nonsense|nonsense"
    )
    corpus = [{"words": line.replace(" ", "\n").encode()} for line in lines.split("|")]
    safe = {"validate", "schema", "methods", "tasks", "recipes show", "adapters inspect", "adapters diff"}

    def check(case: Case) -> None:
        line = case["words"].replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
        verb = next((i for i, word in enumerate(line) if not word.startswith("-")), len(line))
        if verb < len(line) and line[verb] not in safe and " ".join(line[verb : verb + 2]) not in safe:
            line = [*line[:verb], "--help"] if "--" not in line[:verb] else ["--help"]
        before = os.getcwd()
        os.chdir(here)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
                answer(line)
        finally:
            os.chdir(before)
        assert sorted(os.listdir(here)) == listing, "a file was written"
        found = OBEYED.search(printed.getvalue())
        assert found is None, f"a terminal would obey {found!r}"

    def another(random: Random, case: Case) -> None:
        said = case["words"].split(b"\n")
        put = random.choice(("--json", "--", "-", "--help", "-x", "--a=b", "a=b", "seed=1", "0", *TEXTS))
        said.insert(random.randrange(len(said) + 1), put.encode("utf-8", "surrogatepass"))
        case["words"] = b"\n".join(said)

    return Target(Mutator(corpus, [another]), check)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "adapter": adapter,
    "recipe": recipe,
    "override": override,
    "data": data,
    "parquet": parquet,
    "gguf": gguf,
    "chat": chat,
    "checkpoint": checkpoints,
    "words": words,
}
"""Each makes its target in an empty folder."""


def told(error: PeftctlError, most: int = 4_000) -> None:
    """That an error can be shown: texts that any program can write, of a length that somebody reads."""
    problems: Sequence[Any] = error.problems
    assert problems, "an error without a text"
    for text, hint in problems:
        whole = text if hint is None else f"{text}; {hint}"
        assert text.strip(), "an error without a text"
        assert len(whole) <= most, f"a text of {len(whole)} characters: {whole[:200]!r}"
        assert whole.replace("\n", "").isprintable() or OBEYED.search(whole) is None, f"not printable: {whole[:300]!r}"
        whole.encode()
