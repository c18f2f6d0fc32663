"""Prompt tuning: embeddings before the input, trained. Lester et al. 2021, arXiv:2104.08691.

Pr(Y | [P; X])          (sec. 2)

X [length, d] the embeddings of a row, P [n, d] trained, everything else frozen. A model with encoder and decoder reads
P in the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Adapter
from peftctl.engine.attach import adapters_of
from peftctl.engine.method import Method, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.prompt_method import VirtualTokens, alike, embedding, vocabulary
from peftctl.engine.sample import Sample
from peftctl.engine.virtual_tokens import Prepended
from peftctl.errors import AdapterError

INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}
"""Starts -> HF PEFT's names for them. `text` is written as `RANDOM`: a reader would want the tokenizer again."""


@register
@dataclass(frozen=True, kw_only=True)
class Prompt(VirtualTokens):
    """A few trained embeddings before the input: thousands of parameters, good from about a billion in the base."""

    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """What the embeddings start as: those of random common tokens; those of `init_text`, which has to name the task;
    or noise as large as embeddings are, the slowest start."""
    init_text: str | None = None
    """Text to start from; repeated or cut to fit."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    learning_rate: ClassVar[float] = 3e-3  # Adam; HF PEFT's benchmark has 1e-3, its guides 3e-2, the paper Adafactor
    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"
    own: ClassVar[Mapping[str, Any]] = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }

    def __post_init__(self) -> None:
        if self.init == "text" and not (self.init_text or "").strip():
            raise ValueError("init: `text` needs words to start from; hint: write them to `init_text`")
        if self.init != "text" and self.init_text is not None:
            raise ValueError("init_text is the start of `init: text` only; hint: set that, or leave it out")

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        if self.init == "text" and sample is None:
            hint = "`attach(model, method, sample=...)` with the tokenizer in it, or `init: vocabulary`"
            raise AdapterError("method.init: `text` needs the tokenizer of the model", hint)
        return self

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        if self.init != "text" or self.init_from is not None or sample is None:
            return
        adapter = next(a for a in adapters_of(model, name).values() if isinstance(a, Prepended))
        vectors = adapter.vectors()
        ids = sample.tokenizer(self.init_text)["input_ids"]
        if not ids:
            raise AdapterError("method.init_text: the tokenizer makes no tokens of it")
        ids = (ids * math.ceil(len(vectors) / len(ids)))[: len(vectors)]
        weight = embedding(model).weight
        with torch.no_grad():
            vectors.copy_(weight[torch.tensor(ids, device=weight.device)])

    def source(self, model: nn.Module, rows: int) -> Tensor:
        return vocabulary(model, rows) if self.init == "vocabulary" else alike(model, rows)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return super().peft_config(adapters) | {"prompt_tuning_init": INITS.get(self.init, "RANDOM")}

    @classmethod
    def own_fields(cls, read: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        init = read.choice("prompt_tuning_init", ("RANDOM", "SAMPLE_VOCAB", "TEXT"))
        return {"init": "vocabulary" if init == "SAMPLE_VOCAB" else "random"}
