"""The shapes of well-known models (`known.yaml`), so that they can be sized and imitated without a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

Shape = dict[str, Any]
"""A transformers configuration as its `config.json` has it, with `model_type` and `architectures`."""


@lru_cache(maxsize=1)
def known() -> dict[str, Shape]:
    """Every shape by hub id."""
    import yaml

    families = yaml.safe_load((Path(__file__).parent / "known.yaml").read_text("utf-8"))
    return {
        one: {**family["shared"], **dict(zip(family["keys"], values, strict=True))}
        for family in families
        for ids, values in family["sizes"].items()
        for one in ids.split()
    }


def parameters(shape: Shape) -> int:
    """How many parameters a model of this shape has; nothing of its size is built.

    What is tied counts once. The head that fills masked words in is not counted: nothing here uses it.
    """
    import transformers

    [name] = shape["architectures"]
    config = transformers.AutoConfig.for_model(**shape)
    with torch.device("meta"):
        if name.endswith("ForMaskedLM"):
            count: int = transformers.AutoModel.from_config(config).num_parameters()
        else:
            count = getattr(transformers, name)(config).num_parameters()
    # transformers makes every T5 tied, and finds the output head of those that are not in their files alone
    untied = "d_model" in shape and shape.get("tie_word_embeddings") is False
    head: int = config.vocab_size * config.d_model if untied else 0
    return count + head
