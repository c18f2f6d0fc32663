"""adapter_config.json: HF PEFT 0.21's keys and defaults, and how to read those that strangers wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftctl.engine.anatomy import HEADS, under
from peftctl.errors import AdapterError, Problem

SCHEMA = "0.21.2"
"""The version of HF PEFT whose form we write; it is what `peft_version` says."""

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


def refuse_unknown(config: Mapping[str, Any], defaults: Mapping[str, Any], understood: set[str], place: str) -> None:
    """Raise AdapterError for every key that says something we would have to ignore.

    Keys that this schema does not know are left alone when they are empty: newer PEFT adds such keys with each
    release, and an empty one changes nothing.
    """
    problems = [
        Problem(f"{place}: {key}: `{value}` is not supported", "train or convert the adapter without it")
        for key, value in config.items()
        if key not in understood
        and key not in COMMON
        and value != defaults.get(key)
        and value not in (None, False, {}, [])
    ]
    if problems:
        raise AdapterError.of(problems)


QUANTIFIER = re.compile(r"(?<!\\)(?:[*+]|\{\d*,?\d*\})")


def harmless(patterns: object, place: str) -> dict[str, float]:
    """A stranger's `rank_pattern` or `alpha_pattern`, refused when matching it could take for ever.

    A regular expression backtracks without end only through a repeated group or many repetitions in a row.
    """
    if not isinstance(patterns, dict):
        raise AdapterError(f"{place}: expected a mapping of patterns to numbers")
    for pattern, number in patterns.items():
        repeated_group = re.search(r"\)\s*[*+?{]", pattern)
        if len(pattern) > 256 or repeated_group or len(QUANTIFIER.findall(pattern)) > 3:
            raise AdapterError(
                f"{place}: the pattern `{pattern[:60]}` is too complex to be run", "use plain module names"
            )
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e6:
            raise AdapterError(f"{place}: `{pattern}`: expected a number above 0; got `{number}`")
    return dict(patterns)


class Reader:
    """Typed access to the keys of a config that a stranger wrote; a wrong type is an AdapterError."""

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        self.config, self.place = config, place

    def number(self, key: str, default: float) -> float:
        """A finite number from 0 to a million."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
            raise AdapterError(f"{self.place}: {key}: expected a number; got `{value}`")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number of at least one."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise AdapterError(f"{self.place}: {key}: expected a whole number of at least 1; got `{value}`")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; null counts as the default."""
        value = self.config.get(key, default)
        if not isinstance(value, bool | None):
            raise AdapterError(f"{self.place}: {key}: expected true or false; got `{value}`")
        return default if value is None else value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of `choices`; the first when the key is missing."""
        value = self.config.get(key, choices[0])
        if value not in choices:
            raise AdapterError(f"{self.place}: {key}: expected one of {', '.join(choices)}; got `{value}`")
        return str(value)

    def names(self, key: str) -> list[str]:
        """A list of texts; empty when missing or null."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise AdapterError(f"{self.place}: {key}: expected a list of names; got `{value}`")
        return value

    def saved(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """`modules_to_save` without the heads that PEFT names for every classifier whether it has them or not."""
        names = self.names("modules_to_save")
        present = {name for name in names if any(under(key, name) for key in shapes)}
        guessed = set(HEADS) if present & set(HEADS) else set()
        return [name for name in names if name in present or name not in guessed]
