"""What a model ends in, and so which of transformers' classes it is loaded as."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Head:
    """One kind of model."""

    task_type: str | None
    """HF PEFT's name for it, in adapter_config.json; it has none for some."""
    auto: str
    """The class of transformers that knows every model of this kind."""
    mapping: str
    """Where transformers lists them: `MODEL_FOR_..._MAPPING_NAMES`."""
    what: str
    """As a person says it."""
    example: str
    """A model of this kind, for hints."""
    labels: tuple[str, ...] = ()
    """What the classes are called, in the order of the logits."""

    @property
    def classifies(self) -> bool:
        """Whether it ends in a layer of its own for every set of labels, which most checkpoints lack."""
        return self.task_type in ("SEQ_CLS", "TOKEN_CLS")

    def with_labels(self, labels: tuple[str, ...]) -> Head:
        """The same for these labels."""
        return replace(self, labels=labels)

    @property
    def pipeline(self) -> str:
        """What model hubs file it under."""
        return PIPELINES[self.auto]

    def class_of(self, model_type: Any) -> str | None:
        """The class of transformers for a type of model; None where it has no such head."""
        from transformers.models.auto import modeling_auto as auto

        return getattr(auto, self.mapping).get(model_type) if isinstance(model_type, str) else None

    def has(self, name: Any) -> bool:
        """Whether transformers lists a class of this name for it."""
        from transformers.models.auto import modeling_auto as auto

        return name in getattr(auto, self.mapping).values()

    def fits(self, parsed: Any, architectures: Any) -> bool:
        """Whether a model of the configuration `parsed`, saved from the classes `architectures`, can be loaded so."""
        from transformers.models.auto import modeling_auto as auto

        classes = getattr(auto, self.mapping)
        if parsed.model_type not in classes:
            return False
        if self.classifies:
            return True
        if self is CAUSAL:
            # BERT and its kin have a causal class too, which must be told to look back only
            if parsed.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(parsed, "is_decoder", False):
                return False
            # the endings are for old spellings of known classes (`LLaMAForCausalLM`)
            endings: tuple[str, ...] = ("ForCausalLM", "LMHeadModel")
        else:
            endings = ("ForConditionalGeneration",)
        if not isinstance(architectures, list) or not architectures:
            return True
        return any(name in classes.values() or str(name).endswith(endings) for name in architectures)

    def kept_whole(self, config: Mapping[str, Any]) -> list[str] | None:
        """Patterns of the modules of a classifier that are not quantised: those that `atop` tells, which are trained.

        None for another kind of model, of which transformers leaves out the output head. `config` is `config.json`.
        """
        if not self.classifies:
            return None
        import transformers

        prefix = getattr(transformers, str(self.class_of(config["model_type"]))).base_model_prefix
        return [rf"(?!{re.escape(prefix)}\.).*", r".*\.pooler\..*"]

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` and the configuration are told about the labels."""
        if not self.labels:
            return {}
        numbered = dict(enumerate(self.labels))
        return {"num_labels": len(numbered), "id2label": numbered, "label2id": {v: k for k, v in numbered.items()}}


PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "DiffusionPipeline": "text-to-image",
}
"""Hugging Face's names of what each class does."""


def atop(name: str, prefix: str) -> bool:
    """Whether the parameter `name` of a classifier lies outside the model inside it, which is called `prefix`.

    The pooler of BERT's kin lies inside and belongs to what classifies: language models lack it.
    """
    return not name.startswith(f"{prefix}.") or ".pooler." in name


CAUSAL = Head(
    "CAUSAL_LM",
    "AutoModelForCausalLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "causal language model",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
SEQ2SEQ = Head(
    "SEQ_2_SEQ_LM",
    "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "model with an encoder and a decoder",
    "google/flan-t5-small",
)
SEQUENCES = Head(
    "SEQ_CLS",
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "model that can classify texts",
    "google-bert/bert-base-uncased",
)
TOKENS = Head(
    "TOKEN_CLS",
    "AutoModelForTokenClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "model that can classify tokens",
    "google-bert/bert-base-cased",
)
PICTURES = Head(
    None,
    "AutoModelForImageTextToText",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "model that writes about pictures",
    "Salesforce/blip-image-captioning-base",
)
DIFFUSION = Head(
    None,
    "DiffusionPipeline",
    "",
    "pipeline that draws pictures",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Loaded by diffusers (`models/diffusion.py`), which has its own index instead of a mapping."""

HEADS = {head.task_type: head for head in (CAUSAL, SEQ2SEQ, SEQUENCES, TOKENS)}
"""By HF PEFT's names."""
