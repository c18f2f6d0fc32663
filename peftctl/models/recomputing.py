"""Gradient checkpointing: what a model computed is computed again in the backward pass, instead of kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftctl.errors import ModelError


def recompute(model: nn.Module) -> None:
    """Switch it on, as models of transformers and of diffusers do. Raises ModelError for one that cannot."""
    network: Any = model
    try:
        if hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        elif hasattr(network, "gradient_checkpointing_enable"):  # in older versions
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            network.enable_gradient_checkpointing()
    except ValueError as error:
        text = f"trainer.gradient_checkpointing: {type(model).__name__} cannot compute its activations again"
        raise ModelError(text, "leave it out; a smaller `trainer.micro_batch_size` saves memory too") from error
    if hasattr(network, "_require_grads_hooks"):
        # they make everything above the embedding have gradients, for reentrant checkpoints, which these are not
        network.disable_input_require_grads()
