"""P-tuning: embeddings before the input, made by a small network that is trained. Liu et al. 2021, arXiv:2103.10385.

P = MLP(E)                                  `mlp`
P_i = MLP([LSTM(E_1..i); LSTM(E_i..n)])     `lstm`     (eq. 2)

E [n, d] and the networks are trained, P [n, d] is what the model reads before a row's own embeddings, as in `prompt`.
The MLP has the widths d, h, h, d with ReLU between them; the LSTM runs both ways, h numbers each, and the MLP behind it
has the widths 2h, 2h, d. Training moves all of P at once through the network, which makes a good start less important.

HF PEFT's file holds P alone. The network is kept beside it, so that training can go on from a folder of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.config.block import Count, Probability
from peftctl.engine.adapter import Adapter
from peftctl.engine.method import register
from peftctl.engine.peft_config import Reader
from peftctl.engine.prompt_method import VirtualTokens, embedding


class Encoder(nn.Module):
    """Nothing -> P [n, d]."""

    def __init__(self, n: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self) -> Tensor:
        made: Tensor = self.mlp(self.embedding)
        return made


class RecurrentEncoder(nn.Module):
    """Nothing -> P [n, d]."""

    def __init__(self, n: int, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width))
        widths = [width, *[2 * hidden] * (layers - 1)]
        self.lstm = nn.ModuleList(nn.LSTM(size, hidden, bidirectional=True) for size in widths)
        self.dropout = nn.Dropout(dropout)  # not the LSTM's own, whose state on a GPU no checkpoint can hold
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self) -> Tensor:
        states, _ = self.lstm[0](self.embedding)
        for layer in self.lstm[1:]:
            states, _ = layer(self.dropout(states))
        made: Tensor = self.mlp(states)
        return made


@register
@dataclass(frozen=True, kw_only=True)
class PTuning(VirtualTokens):
    """Embeddings before the input that a small network makes: steadier to train than `prompt`, as cheap to use."""

    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    """The network; `none` trains the embeddings themselves, as what is read from a folder of HF PEFT's has to."""
    encoder_hidden_size: Count | None = None
    """h; the width of the embeddings when left out."""
    encoder_num_layers: Count = 2
    """Layers of the LSTM."""
    encoder_dropout: Probability = 0.0
    """Fraction of the numbers between layers of the LSTM dropped in training."""

    peft_type: ClassVar[str] = "P_TUNING"
    learning_rate: ClassVar[float] = 1e-3  # HF PEFT's benchmark
    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"
    own: ClassVar[Mapping[str, Any]] = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }

    def __post_init__(self) -> None:
        if self.encoder_dropout and self.encoder_num_layers == 1:
            raise ValueError("encoder_dropout acts between layers, and there is one; hint: `encoder_num_layers: 2`")

    def source(self, model: nn.Module, rows: int) -> Tensor | nn.Module:
        width = embedding(model).embedding_dim
        hidden = self.encoder_hidden_size or width
        if self.encoder == "lstm":
            return RecurrentEncoder(rows, width, hidden, self.encoder_num_layers, self.encoder_dropout)
        return Encoder(rows, width, hidden) if self.encoder == "mlp" else torch.zeros(rows, width)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = super().peft_config(adapters)
        return made | {
            "encoder_dropout": self.encoder_dropout,
            "encoder_hidden_size": self.encoder_hidden_size or made["token_dim"],
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
        }

    @classmethod
    def own_fields(cls, read: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        kind = read.choice("encoder_reparameterization_type", ("MLP", "LSTM")).lower()
        hidden = read.config.get("encoder_hidden_size")
        return {
            "encoder": kind if any(key.startswith("encoder.") for key in shapes) else "none",
            "encoder_hidden_size": None if hidden is None else read.count("encoder_hidden_size", 1),
            "encoder_num_layers": read.count("encoder_num_layers", 2, most=1000),
            "encoder_dropout": read.number("encoder_dropout", 0.0, most=1),
        }
