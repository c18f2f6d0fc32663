"""What kind of model an adapter is for, by its folder and the configuration of its base."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from peftctl.engine.peft_config import read_config
from peftctl.engine.tensor_file import shapes
from peftctl.models.folder import CONFIG, PIPELINE, read_json
from peftctl.models.head import CAUSAL, DIFFUSION, HEADS, PICTURES, SEQ2SEQ, SEQUENCES, TOKENS, Head
from peftctl.models.origin import labels_in

CLASSIFIERS = ("score", "classifier", "classification_head")
"""What transformers calls the outermost module of a classifier."""


def classifies(adapter: Path) -> bool:
    """Whether the adapter in the folder `adapter` is for a classifier."""
    return read_config(adapter).get("task_type") in (SEQUENCES.task_type, TOKENS.task_type)


def head_of(adapter: Path, base: Path) -> Head:
    """What the model in the folder `base` is loaded as for the adapter in the folder `adapter`, with its labels.

    Raises AdapterError and ModelError for folders that are neither, RunError for labels that are none.
    """
    if (base / PIPELINE).is_file():
        return DIFFUSION
    config = read_json(base / CONFIG, str(base))
    if classifies(adapter):
        found = by_folder(adapter)
        known = config.get("id2label")
        count = len(known) if isinstance(known, dict) else 2  # transformers' own default
        return found.with_labels(()) if not labels_in(adapter) and len(found.labels) == count else found
    said = read_config(adapter).get("task_type")
    named = HEADS.get(said) if isinstance(said, str) else None
    # models that write about pictures are called like those with an encoder and a decoder, or like causal ones
    kind, classes = SimpleNamespace(**{"model_type": None, **config}), config.get("architectures")
    if named is CAUSAL:
        alike = PICTURES.class_of(kind.model_type) == CAUSAL.class_of(kind.model_type)
        tried: tuple[Head, ...] = (PICTURES,) if alike else ()
    else:
        tried = (SEQ2SEQ, PICTURES) if named is SEQ2SEQ else (PICTURES, SEQ2SEQ, CAUSAL)
    return next((head for head in tried if head.fits(kind, classes)), named or CAUSAL)


def classes_of(base: Path) -> tuple[str, ...]:
    """What the model in the folder `base` calls its classes, in the order of its logits; none where it says nothing."""
    known = read_json(base / CONFIG, str(base)).get("id2label") if (base / CONFIG).is_file() else None
    names = [known.get(str(number)) for number in range(len(known))] if isinstance(known, dict) else []
    return () if any(not isinstance(name, str) for name in names) else tuple(map(str, names))


def by_folder(adapter: Path) -> Head:
    """What the folder `adapter` alone tells: enough for all but what writes about pictures without saying so."""
    config = read_config(adapter)
    said, auto = config.get("task_type"), config.get("auto_mapping")
    head = (HEADS.get(said) if isinstance(said, str) else None) or CAUSAL
    if head.classifies:
        return head.with_labels(labels_in(adapter) or numbered(adapter))
    if isinstance(auto, dict) and str(auto.get("parent_library")).startswith("diffusers."):
        return DIFFUSION
    return PICTURES if said is None and isinstance(auto, dict) and PICTURES.has(auto.get("base_model_class")) else head


def numbered(adapter: Path) -> tuple[str, ...]:
    """`LABEL_0` and so on, as many as the adapter's own head has; none where it has none.

    HF PEFT's folders do not say what the classes are called, nor how many there are.
    """
    heads = {
        key: shape[0]
        for key, shape in shapes(adapter).items()
        if key.partition(".")[0] in CLASSIFIERS and key.endswith(".weight") and len(shape) == 2 and ".lora_" not in key
    }
    last = [count for key, count in heads.items() if "out_proj" in key] or list(heads.values())
    return tuple(f"LABEL_{number}" for number in range(last[0])) if len(last) == 1 else ()
