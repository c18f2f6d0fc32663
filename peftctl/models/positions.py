"""How many tokens a model has learned positions for; most newer ones rotate or compare, and have no such limit."""

from __future__ import annotations

from torch import nn

from peftctl.engine.attach import methods


def positions(model: nn.Module) -> int | None:
    """Tokens of the longest row that `model` can read; None where nothing limits it but memory.

    Tables of pictures' patches and of distances between tokens are no limit of that kind.
    """
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        table = isinstance(module, nn.Embedding) and ("position" in last or last == "wpe")
        if table and "relative" not in last and "vision" not in name:
            # the first rows of some tables belong to no token: two of BART's, those up to the pad token of RoBERTa's
            padded = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - (getattr(module, "offset", 0) or padded))
    return min(found, default=None)


def room(model: nn.Module) -> int | None:
    """Tokens of the longest row beside the virtual ones of what is attached; None where only memory limits it."""
    limit = positions(model)
    virtual = sum(getattr(method, "num_virtual_tokens", 0) for method in methods(model).values())
    return None if limit is None else limit - virtual
