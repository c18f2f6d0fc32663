"""Full fine-tuning: every parameter of the model is trained, in place. No paper: it is what adapters are measured by.

W <- W - update(dL/dW)        for every W of the model, whatever its shape

The one method that changes the base. So whatever needs the base as it was is refused while it is attached: switching
it off, taking it off, other adapters beside it, a reference model. On disk it is a folder like any other, which holds
all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, modules
from peftctl.engine.method import Method, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError


class Whole(Adapter):
    """Stands around the whole model and leaves it as it is: what it would save are the parameters of its host.

    A skeleton without weights has none to write into. There they are kept apart, to be merged from.
    """

    replaces = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        vars(self)["host"] = host
        made = {id(p): torch.zeros(p.shape) for p in host.parameters() if p.is_meta}
        self.apart = {name: made[id(p)] for name, p in named(host, tied=True).items() if p.is_meta}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        return self.apart[name].to(value) if self.apart else value

    def exported(self) -> dict[str, Tensor]:
        return {name: self.apart.get(name, p) for name, p in named(self.host, tied=False).items()}

    def peft_key(self, site: str, leaf: str) -> str:
        return f"base_model.model.{leaf}"


@register
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All parameters, in place: the most to gain, and 16 bytes a parameter with AdamW, whatever the base came in.

    That is 4 for the weight, 4 for its gradient, 8 for the two moments: 2 GiB for 135 million parameters, 119 for 8
    billion, activations apart. Each checkpoint takes 16 bytes a parameter of disk too.
    """

    dtype: Literal["float32", "base"] = "float32"
    """`float32`: a 16-bit base becomes float32 when training starts. `base` trains it in the dtype it came in: in
    bfloat16 8 bytes a parameter, but updates smaller than 0.4 % of a weight are lost in rounding."""

    peft_type: ClassVar[str] = "FULL"
    learning_rate: ClassVar[float] = 2e-5
    in_place = True
    merges: ClassVar[str] = "into any base, exactly: its weights take the place of the base's"
    clashes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "model.quantization": ("weights of 4 or 8 bits cannot be trained", "`quantization: none`, or `type: qlora`"),
        "method.init_from": ("it starts from weights, not from an adapter", "merge that one, then train the result"),
    }

    def sites(self, model: nn.Module) -> list[Site]:
        held = [site.name for site in modules(model) if hosts.is_quantised(site.module)]
        if held:
            text = f"method: {len(held)} modules, such as `{held[0]}`, are stored in 4 or 8 bits and cannot be trained"
            raise AdapterError(text, "`quantization: none`, or an adapter: `type: qlora`")
        absent = {p.is_meta for p in model.parameters()}
        if len(absent) > 1:
            text = "a fully fine-tuned model does not run in parts: all its weights have to fit into the memory"
            raise AdapterError(text, "free some memory, or use a larger machine")
        return [Site("", model)]

    def adapter(self, site: Site) -> Adapter:
        return Whole(site.module)

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        if self.dtype == "float32":
            model.float()

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Full:
        read = Reader(config, place)
        read.supported({}, set())
        read.done()
        return cls(dtype="base")  # to run, it takes the form that its reader has asked for


def named(model: nn.Module, tied: bool) -> dict[str, nn.Parameter]:
    """The parameters of the base model by name; one that has several names under each, or under its first alone."""
    found = model.named_parameters(remove_duplicate=not tied)
    return {name: p for name, p in found if ".adapters." not in f".{name}"}
