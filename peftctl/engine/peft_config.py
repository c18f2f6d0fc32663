"""adapter_config.json: HF PEFT 0.21's keys and defaults, and how to read those that strangers wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftctl.config.quote import quoted, shown
from peftctl.engine.anatomy import HEADS, has_decoder, under
from peftctl.engine.patterns import STEPS, steps
from peftctl.errors import AdapterError, Problem, StorageError

SCHEMA = "0.21.2"
"""The version of HF PEFT whose form we write; it is what `peft_version` says."""

PEFT_TYPES = {
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA"),
    *("FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR"),
    *("LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING"),
    *("TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"),
}
"""Every `peft_type` that HF PEFT of this version knows; adapters of another one are for peftctl alone."""

COMMON = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
"""The keys that every adapter_config.json has; none of them changes what an adapter computes."""

LORA: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""LoraConfig's own keys with its defaults."""

LORA_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that rewrite the base when PEFT loads the adapter."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def common(model: nn.Module, peft_type: str) -> dict[str, Any]:
    """The keys that every adapter_config.json has."""
    name = type(model).__name__
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    if task == "SEQ_2_SEQ_LM" and not has_decoder(model):  # writes about pictures; PEFT would feed it a decoder's ids
        task = None
    auto = {"base_model_class": name, "parent_library": type(model).__module__} if task is None else None
    return {
        "auto_mapping": auto,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_type": peft_type,
        "peft_version": SCHEMA,
        "revision": None,
        "task_type": task,
    }


CONFIG = "adapter_config.json"

PATTERNS = 4096
"""Patterns in one mapping; compiling as many takes about half a second."""


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`: at most 1 MB, no repeated keys, no NaN."""
    path = folder / CONFIG
    try:
        if not folder.is_dir():
            raise AdapterError(f"{folder}: no such adapter folder")
        if not path.is_file():
            inside = folder / "adapter"
            hint = f"that of this run is `{inside}`" if (inside / CONFIG).is_file() else None
            raise AdapterError(f"{folder}: no adapter here: `{CONFIG}` is missing", hint)
        if path.stat().st_size > 1 << 20:
            raise AdapterError(f"{path}: larger than 1 MB, which no adapter needs")
        text = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{shown(str(folder))}: cannot be read: {error.strerror}") from None
    try:
        config = json.loads(text, object_pairs_hook=unique(path), parse_constant=refuse(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path: expected a text; got {quoted(str(base))}")
    return config


def unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise AdapterError(f"{path}: a key stands there twice")
        return mapping

    return build


def refuse(path: Path) -> Callable[[str], Any]:
    def constant(word: str) -> Any:
        raise AdapterError(f"{path}: `{word}` is not a number")

    return constant


class Reader:
    """Typed access to the keys of a config that a stranger wrote; `done` raises all that was wrong."""

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        self.config, self.place = config, place
        self.problems: list[Problem] = []

    def wrong(self, key: str, what: str, hint: str | None = None) -> None:
        """Note that `key` is `what`."""
        self.problems.append(Problem(f"{self.place}: {shown(key)}: {what}", hint))

    def done(self) -> None:
        """Raise AdapterError when anything was wrong."""
        if self.problems:
            raise AdapterError.of(self.problems)

    def supported(self, defaults: Mapping[str, Any], understood: set[str]) -> None:
        """Note every key that says something we would have to ignore.

        Keys that this schema does not know are left alone when they are empty: newer PEFT adds such keys with each
        release, and an empty one changes nothing.
        """
        for key, value in self.config.items():
            if key in understood or key in COMMON or value == defaults.get(key) or value in (None, False, {}, []):
                continue
            self.wrong(key, f"{quoted(str(value))} is not supported", "train or convert the adapter without it")

    def number(self, key: str, default: float, most: float = 1e6) -> float:
        """A finite number from 0 to `most`."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            self.wrong(key, f"expected a number from 0 to {most:g}; got {quoted(str(value))}")
            return default
        return value

    def count(self, key: str, default: int, least: int = 1, most: float = 1e6) -> int:
        """A whole number from `least` to `most`."""
        noted = len(self.problems)
        value = self.number(key, default, most)
        if len(self.problems) == noted and (value != int(value) or value < least):
            self.wrong(key, f"expected a whole number of at least {least}; got {quoted(str(value))}")
            return default
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; null counts as the default."""
        value = self.config.get(key, default)
        if not isinstance(value, bool | None):
            self.wrong(key, f"expected true or false; got {quoted(str(value))}")
            return default
        return default if value is None else value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of `choices`; the first when the key is missing."""
        value = self.config.get(key, choices[0])
        if value not in choices:
            self.wrong(key, f"expected one of {', '.join(choices)}; got {quoted(str(value))}")
            return choices[0]
        return str(value)

    def names(self, key: str) -> list[str]:
        """A list of texts; empty when missing or null."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.wrong(key, f"expected a list of names; got {quoted(str(value))}")
            return []
        return value

    def patterns(self, key: str, names: Collection[str]) -> dict[str, float]:
        """A mapping of regular expressions to numbers; none that would take for ever to match against `names`."""
        value = self.config.get(key) or {}
        if not isinstance(value, dict) or len(value) > PATTERNS:
            self.wrong(key, f"expected a mapping of at most {PATTERNS} patterns to numbers")
            return {}
        noted, left = len(self.problems), float(STEPS)
        for pattern, number in value.items():
            left -= steps(pattern, names)
            if left < 0:
                self.wrong(key, f"the pattern {quoted(pattern)} is too complex to be run", "use plain module names")
                break
            try:
                re.compile(pattern)
            except re.error as error:
                self.wrong(key, f"{quoted(pattern)} is no regular expression: {error}")
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1e6:
                self.wrong(key, f"{quoted(pattern)}: expected a number above 0; got {quoted(str(number))}")
        return dict(value) if len(self.problems) == noted else {}

    def sites(
        self, shapes: Mapping[str, tuple[int, ...]], leaf: str | tuple[str, ...], what: str
    ) -> dict[str, tuple[int, ...]]:
        """Each module of which the tensor file holds a tensor `leaf`, with its shape; it has to hold some `what`."""
        leaves = (leaf,) if isinstance(leaf, str) else leaf
        found = {key.removesuffix(end): shape for key, shape in shapes.items() for end in leaves if key.endswith(end)}
        if not found:
            self.wrong("peft_type", f"the tensor file beside it holds no {what}")
        return found

    def same_ranks(self, sites: Mapping[str, tuple[int, ...]], said: Callable[[str], float]) -> None:
        """Note every module whose tensor [rank, ...] has not the rank that the config says for its name."""
        for name, shape in sites.items():
            rank = shape[0] if shape else 0
            if rank != said(name):
                self.wrong("r", f"{quoted(name)} has rank {rank}, the config says {said(name)}")

    def saved(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """`modules_to_save` without the heads that PEFT names for every classifier whether it has them or not."""
        names = self.names("modules_to_save")
        present = {name for name in names if any(under(key, name) for key in shapes)}
        guessed = set(HEADS) if present & set(HEADS) else set()
        return [name for name in names if name in present or name not in guessed]
