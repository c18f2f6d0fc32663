"""Whether a model with its adapters can take the fast path: by its parts first, then by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Stack
from peftctl.engine.inputs import evaluating
from peftctl.fast.attention import Attention
from peftctl.fast.block import AttentionBlock, GatedBlock, Norm
from peftctl.fast.plain import Plain
from peftctl.fast.remembered import Remembered
from peftctl.fast.rows import SHARED, arranged
from peftctl.fast.trunk import Trunk

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""The modules of a layer of Llama's kind."""

ATTENTION = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATED = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""Its linears by name; Phi-3 has one in the place of several."""

ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Largest difference between what a layer adds to hidden states that is rounding, relative to it; a tenth of it, of the
states themselves. SmolLM2-135M in bfloat16 has 0.012, in 4 bits too."""


class Unfit(Exception):
    """Why a model cannot take the fast path."""


def trunk_of(network: Any, kernels: Plain, attention: type[Attention] = Attention) -> Trunk:
    """The fast trunk of a causal language model. Raises Unfit."""
    model = getattr(network, getattr(network, "base_model_prefix", "") or "model", None)
    kind = type(network).__name__
    if model is None or not all(hasattr(model, part) for part in ("embed_tokens", "layers", "rotary_emb", "norm")):
        raise Unfit(f"{kind} is not built as Llama is")
    if "forward" in vars(model):
        raise Unfit(f"the forward of {type(model).__name__} was replaced by somebody else")
    if network.dtype not in ROUNDING:
        raise Unfit(f"{network.dtype} is not supported".replace("torch.", ""))
    config = model.config
    if getattr(config, "attention_dropout", 0):
        raise Unfit("dropout of attention probabilities")
    named = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
    activation = ACTIVATIONS.get(named)
    if activation is None:
        raise Unfit(f"activation `{named}`")
    layers = [
        (
            attention_block(layer, config, partial(attention, kernels), f"layers.{i}"),
            gated_block(layer, activation, f"layers.{i}"),
        )
        for i, layer in enumerate(model.layers[: config.num_hidden_layers])
    ]
    refuse_positions(model, layers[0][0].width)
    linears = {host for layer in layers for block in layer for host in block.hosts}
    refuse_others(model, linears)
    remembered = Remembered(config.hidden_size, network.dtype)
    return Trunk(model, model.forward, layers, kernels, remembered)


def attention_block(
    layer: nn.Module, config: Any, make: Callable[[float, int], Attention], place: str
) -> AttentionBlock:
    """The first half of `layer`, whose attention `make` makes of its scale and window. Raises Unfit."""
    refuse_parts(layer, LAYER, place)
    attention = cast(Any, layer.self_attn)
    into = next((names for names in ATTENTION if hasattr(attention, names[0])), ATTENTION[0])
    norms = {name: norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    refuse_parts(attention, {*into, "o_proj", *norms}, f"{place}.self_attn")
    width = attention.head_dim
    keys = width * config.num_key_value_heads
    window = getattr(attention, "sliding_window", None if hasattr(config, "layer_types") else config_window(config))
    return AttentionBlock(
        norm(cast(nn.Module, layer.input_layernorm)),
        into=tuple(linear(attention, name, place) for name in into),
        o=linear(attention, "o_proj", place),
        widths=(width * config.num_attention_heads, keys, keys),
        width=width,
        attention=make(float(attention.scaling), int(window or 0)),
        turned=bool(getattr(attention, "use_rope", True)),
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
    )


def gated_block(layer: nn.Module, activation: Literal["silu", "gelu_tanh"], place: str) -> GatedBlock:
    """The second half. Raises Unfit."""
    mlp = cast(nn.Module, layer.mlp)
    into = next((names for names in GATED if hasattr(mlp, names[0])), GATED[0])
    refuse_parts(mlp, {*into, "down_proj"}, f"{place}.mlp")
    linears = tuple(linear(mlp, name, place) for name in into)
    after = norm(cast(nn.Module, layer.post_attention_layernorm))
    return GatedBlock(after, into=linears, down=linear(mlp, "down_proj", place), activation=activation)


def refuse_parts(module: nn.Module, wanted: set[str], place: str) -> None:
    """Raise Unfit for a module that has other parts than those wanted, among what has parameters."""
    parts = dict(module.named_children())
    if isinstance(parts.get("adapters"), Stack):
        raise Unfit(f"an adapter around `{place}`")
    have = {name for name, part in parts.items() if any(True for _ in part.parameters())}
    if have != wanted:
        odd = have - wanted or wanted - have
        what = "has" if have - wanted else "lacks"
        raise Unfit(f"`{place}` {what} {', '.join(f'`{name}`' for name in sorted(odd))}")


def refuse_positions(model: Any, width: int) -> None:
    """Raise Unfit where positions do not turn the whole of every head by angles that are all layers' own."""
    try:
        x = torch.zeros(1, 2, model.config.hidden_size, dtype=model.dtype, device=model.device)
        cos, sin = model.rotary_emb(x, torch.arange(2, device=model.device)[None])
    except (TypeError, ValueError) as error:
        raise Unfit(f"positions of another kind: {type(model.rotary_emb).__name__}") from error
    if not cos.shape == sin.shape == (1, 2, width):
        raise Unfit("positions turn a part of each head")


def linear(parent: Any, name: str, place: str) -> nn.Module:
    """A linear that the fast path computes itself. Raises Unfit."""
    module: nn.Module = getattr(parent, name)
    if hosts.kind(module) not in ("Linear", "Linear4bit"):
        raise Unfit(f"`{place}`: `{name}` is a {type(module).__name__}")
    if hasattr(module, "_hf_hook"):
        raise Unfit("parts of the model are on other devices")
    return module


def norm(module: nn.Module) -> Norm:
    """An RMS norm by what it calls its epsilon. Raises Unfit."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or getattr(module, "bias", None) is not None:
        raise Unfit(f"{type(module).__name__} is no RMS norm")
    return Norm(module, float(eps), 1.0 if "Gemma" in type(module).__name__ else 0.0)


def config_window(config: Any) -> int | None:
    """How far back a token sees, where a configuration has one number for all layers."""
    return getattr(config, "sliding_window", None)


def refuse_others(model: nn.Module, linears: set[nn.Module]) -> None:
    """Raise Unfit for adapters and training elsewhere in the layers."""
    for name, module in cast(nn.Module, model.layers).named_modules():
        stack = module._modules.get("adapters")
        if isinstance(stack, Stack) and module not in linears:
            raise Unfit(f"an adapter around `layers.{name}`")
    for name, parameter in own_parameters(cast(nn.Module, model.layers)):
        if parameter.requires_grad:
            raise Unfit(f"`layers.{name}` of the base is trained")


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base."""
    return ((name, p) for name, p in module.named_parameters() if "adapters." not in name)


@torch.no_grad()
def refuse_different(network: nn.Module, trunk: Trunk) -> None:
    """Raise Unfit where the fast trunk computes something else than the model, on a few random tokens in two rows.

    Layer by layer, each from what the model itself gives it, so that rounding does not add up; then as a whole, with
    what both rows begin with computed once.
    """
    generator = torch.Generator().manual_seed(0)
    size = trunk.model.embed_tokens.num_embeddings
    ids = torch.randint(size, (2, SHARED + 4), generator=generator).to(trunk.model.device)
    ids[1, :SHARED] = ids[0, :SHARED]
    mask = torch.ones_like(ids)
    mask[1, SHARED + 2 :] = 0
    rows = arranged(ids, mask, None, ids.shape, share=False)
    assert rows is not None
    seen: list[tuple[Tensor, Tensor]] = []

    def look(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        after = out if isinstance(out, Tensor) else out[0]
        seen.append((args[0].flatten(0, 1)[rows.source], after.flatten(0, 1)[rows.source]))

    hooks = [layer.register_forward_hook(look) for layer in trunk.model.layers[: len(trunk.layers)]]
    try:
        with evaluating(network):
            there = trunk.own(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for number, (before, after) in enumerate(seen):
                here = trunk.through(before, rows, number, number + 1)
                if not same(here, after, before):
                    raise Unfit(f"`layers.{number}` computes something else than its parts tell")
            whole: Tensor = trunk(input_ids=ids, attention_mask=mask).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if not same(whole[mask.bool()], there[mask.bool()]):
        raise Unfit(f"{type(network).__name__} computes something else than its layers tell")


def same(here: Tensor, there: Tensor, before: Tensor | None = None) -> bool:
    """Whether two hidden states [tokens, width] differ by rounding; if given, of what was added to those `before`."""
    unit = ROUNDING[there.dtype]
    here, there = here.float(), there.float()
    if before is None:
        allowed = 4 * unit * there.norm()
    else:
        allowed = unit * (there - before.float()).norm() + unit / 10 * there.norm()
    return bool(torch.isfinite(here).all()) and bool((here - there).norm() <= allowed)
