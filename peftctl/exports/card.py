"""The model card of an adapter or a merged model: README.md, as model hubs read it.

What comes from a recipe, a file name or data is escaped wherever it stands, and no folder of this machine is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from peftctl.config.document import parse
from peftctl.config.quote import shown
from peftctl.config.write import to_yaml
from peftctl.models.head import CAUSAL, DIFFUSION, Head

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LOCAL = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]")
"""How a path begins, and no hub id does."""
MARKS = re.compile(r"[\\\[\]<>*_!#|~&]")
"""What Markdown takes for markup; a backtick alone opens no more than a span of code."""
HERE = "path/to/this/folder"
GGUF = ".gguf"
VLLM_RANK = 16
"""The largest rank that vLLM serves unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells."""

    base: str
    """Hub id or path of the base model; of a path only the last part is told."""
    method: str
    """What `method` says, in one line."""
    recipe: str
    """The resolved recipe, as YAML."""
    counts: Mapping[str, Mapping[str, int]]
    """Rows read, kept, truncated, dropped and skipped, for training and evaluation."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What was measured, for base and adapter."""
    head: Head = CAUSAL
    """What kind of model it is, with the labels of a classifier."""
    merged: bool = False
    """Whether the card is for a merged model instead of an adapter."""
    peft: bool = True
    """Whether HF PEFT can read the adapter."""


def card(facts: Facts) -> str:
    """README.md of an adapter folder or a merged model. Raises RecipeError for a recipe that is none."""
    base = shown(public(facts.base), 200)
    recipe = parse(facts.recipe, "recipe").data
    kind = "Merged model" if facts.merged else "Adapter"
    parts = [
        header(base, library(facts), facts.head),
        f"# {kind} of {span(base)}",
        f"Trained with peftctl: {inline(facts.method)}.",
        "## Use",
        *use(base, facts, recipe),
    ]
    if facts.head.labels:
        names = ", ".join(span(shown(label, 100)) for label in facts.head.labels)
        parts.append(f"Classes, in the order of the logits: {names}.")
    if facts.counts:
        columns = ["rows", "read", "kept", "truncated", "split", "dropped", "skipped"]
        parts += ["## Data", "Where the rows went:", table(columns, facts.counts)]
    if facts.figures:
        metrics = list(dict.fromkeys(metric for values in facts.figures.values() for metric in values))
        parts += ["## Evaluation", table(["model", *metrics], facts.figures)]
    parts += ["## Recipe", fenced(to_yaml(shareable(recipe)), "yaml")]
    return "\n\n".join(parts) + "\n"


def library(facts: Facts) -> str:
    """What reads the folder, as hubs call it."""
    if facts.head is DIFFUSION:
        return "diffusers"
    return "transformers" if facts.merged else "peft" if facts.peft else "peftctl"


def use(base: str, facts: Facts, recipe: Any) -> list[str]:
    """How to load what the card is for."""
    if facts.head is DIFFUSION:
        return drawing_use(base, facts)
    if facts.merged:
        return merged_use(facts.head)
    return adapter_use(base, facts, recipe) if facts.peft else own_use(base, facts.head)


def drawing_use(base: str, facts: Facts) -> list[str]:
    """How diffusers loads the adapter of a pipeline, or a merged one."""
    name = json.dumps(HERE if facts.merged else base, ensure_ascii=False)
    load = f"from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained({name})\n"
    draw = 'picture = pipeline("what it shows").images[0]'
    if facts.merged:
        return [fenced(load + draw, "python")]
    if facts.method.lower().startswith(("`lora`", "`dora`")):
        return [
            "With diffusers, where `pytorch_lora_weights.safetensors` is here:",
            fenced(f'{load}pipeline.load_lora_weights("{HERE}")\n{draw}', "python"),
        ]
    part = "pipeline.unet"
    return [
        f"With peftctl; `{part}` is `pipeline.transformer` where there is no UNet:",
        fenced(f'import peftctl\n{load}peftctl.load({part}, "{HERE}")\n{draw}', "python"),
    ]


def header(base: str, library: str, head: Head) -> str:
    """The YAML in front, which hubs index; they take a base model by its hub id alone."""
    hub = {"base_model": base} if HUB_ID.fullmatch(base) else {}
    return f"---\n{to_yaml({**hub, 'library_name': library, 'pipeline_tag': head.pipeline, 'tags': ['peftctl']})}---"


def adapter_use(base: str, facts: Facts, recipe: Any) -> list[str]:
    """How peft, transformers and, for what it can serve, vLLM load the adapter."""
    load = loading(base, facts.head)
    parts = [
        "With peft:",
        fenced(
            f"from peft import PeftModel\nfrom transformers import {facts.head.auto}\n\n"
            f'model = PeftModel.from_pretrained({load}, "{HERE}")',
            "python",
        ),
        "With transformers, where peft is installed:",
        fenced(f'model = {load}\nmodel.load_adapter("{HERE}")', "python"),
    ]
    served = facts.head is CAUSAL and facts.method.lower().startswith("`lora`")  # our key of it, or PEFT's
    if not served or base.endswith(GGUF):
        return parts
    fields = recipe.get("method") if isinstance(recipe, dict) else None
    rank = fields.get("r") if isinstance(fields, dict) else None
    option = f" --max-lora-rank {rank}" if isinstance(rank, int) and rank > VLLM_RANK else ""
    serve = f"vllm serve {shell(base)} --enable-lora{option} --lora-modules adapter={HERE}"
    return [*parts, "With vLLM:", fenced(serve, "sh")]


def loading(base: str, head: Head) -> str:
    """The Python expression that loads the base with transformers; a new head has to have the right size."""
    name = json.dumps(base, ensure_ascii=False)
    given = ['"path/to/its/folder"', f"gguf_file={name}"] if base.endswith(GGUF) else [name]
    if head.labels:
        given.append(f"num_labels={len(head.labels)}")
    return f"{head.auto}.from_pretrained({', '.join(given)})"


def own_use(base: str, head: Head) -> list[str]:
    """How to load an adapter of a method that HF PEFT does not have."""
    code = (
        f'import peftctl\nfrom transformers import {head.auto}\n\nmodel = peftctl.load({loading(base, head)}, "{HERE}")'
    )
    return ["With peftctl; HF PEFT has no such method:", fenced(code, "python")]


def merged_use(head: Head) -> list[str]:
    """How transformers and, for what it can serve, vLLM load the merged model."""
    code = f'from transformers import {head.auto}\n\nmodel = {head.auto}.from_pretrained("{HERE}")'
    serve = ["With vLLM:", fenced(f"vllm serve {HERE}", "sh")] if head is CAUSAL else []
    return [fenced(code, "python"), *serve]


def table(columns: list[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, a row for each entry of `rows`."""
    lines = [list(map(inline, columns)), ["---"] * len(columns)]
    for name, values in rows.items():
        found = [values.get(column, "") for column in columns[1:]]
        lines.append([inline(name), *(f"{v:.4g}" if isinstance(v, float) else inline(str(v)) for v in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def public(name: str) -> str:
    """A model's name as others may see it: a hub id as it is, a path without the folders it lies in."""
    return PureWindowsPath(name).name if LOCAL.match(name) or "\\" in name else name


def shareable(value: Any) -> Any:
    """Plain data with every absolute path in it cut to its last part."""
    if isinstance(value, Mapping):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    absolute = isinstance(value, str) and re.match(r"[/~]|[A-Za-z]:[/\\]|\\\\", value)
    return PureWindowsPath(value).name if absolute else value


def inline(text: str) -> str:
    """Foreign text on one line, of which Markdown makes text and spans of code at most."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def span(text: str) -> str:
    """Foreign text as a span of code that it cannot leave."""
    text = " ".join(text.split())
    ticks = "`" * (longest_run(text) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str) -> str:
    """A block of code that `text` cannot leave."""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def shell(text: str) -> str:
    """A word for a shell."""
    return text if re.fullmatch(r"[\w./@-]+", text, re.ASCII) else "'" + text.replace("'", "'\\''") + "'"
