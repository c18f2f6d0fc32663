"""What kind of model a configuration describes: only one of the kind asked for, of a known type, is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from peftctl.errors import ModelError
from peftctl.models.folder import Stored
from peftctl.models.head import CAUSAL, Head
from peftctl.models.quiet import quiet, reason

NEW = 10**8
"""Parameters that may be new beside those in the files: the head of a classifier."""

_FOREIGN = "are some files missing, or do configuration and weights belong to different models?"


def check_kind(folder: Path, config: dict[str, Any], stored: Stored, place: str, head: Head = CAUSAL) -> None:
    """Refuse what is no model of the kind `head`, by its configuration alone.

    Args:
        config: the contents of `config.json`.
        stored: what the weight files hold; a configuration larger than that is refused before anything of its size
            is built.

    Raises:
        ModelError: an unknown type, another kind of model, a configuration that does not make sense.
    """
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where, kind = f"{place}/config.json", config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{where}: no `model_type`", "is it the configuration of a transformers model?")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=1)
        hint = f"did you mean `{near[0]}`?" if near else "a newer transformers may know it"
        if "auto_map" in config:
            hint = "it brings code of its own, which is never run; choose a model that transformers knows itself"
        raise ModelError(f"{where}: `model_type: {kind}` is unknown to transformers {__version__}", hint)
    try:
        with quiet():
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        raise ModelError(f"{where}: does not describe a `{kind}` model: {reason(error)}") from error

    layers = getattr(parsed, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > stored.tensors:
        raise ModelError(f"{where}: {layers} layers, but only {stored.tensors} tensors in the files", _FOREIGN)
    for key in ("vocab_size", "hidden_size"):
        size = getattr(parsed, key, 0)
        if isinstance(size, int) and size > stored.largest:
            raise ModelError(f"{where}: `{key}: {size}`, but no tensor is larger than {stored.largest}", _FOREIGN)
    architectures = config.get("architectures")
    if head.fits(parsed, architectures):
        _no_larger(parsed, stored, where, head)
        return
    what = ", ".join(f"`{name}`" for name in architectures) if isinstance(architectures, list) else f"`{kind}`"
    raise ModelError(f"{place}: {what} is no {head.what}", f"choose one such as `{head.example}`")


def _no_larger(parsed: Any, stored: Stored, where: str, head: Head) -> None:
    """Refuse a configuration of a far larger model than is stored: transformers would make up what it does not find."""
    import torch
    import transformers

    try:
        with quiet(), torch.device("meta"):
            network = getattr(transformers, head.auto).from_config(parsed)
    except Exception:  # the loader builds it again, and says what is wrong
        return
    numbers = sum(parameter.numel() for parameter in network.parameters())
    if numbers > 2 * stored.numbers + NEW:
        text = f"{where}: a model of {numbers:,} parameters, but only {stored.numbers:,} numbers in the files"
        raise ModelError(text, _FOREIGN)
