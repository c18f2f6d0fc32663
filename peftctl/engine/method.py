"""A fine-tuning method: its hyperparameters are fields, its behaviour a handful of methods with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from peftctl.config.block import Block, Located
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, ends_with, find, modules
from peftctl.engine.sample import Sample
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError, Problem


@dataclass(frozen=True, kw_only=True)
class Method(Block):
    """What a recipe's `method` block becomes. A method overrides one to three of these."""

    init_from: Located | None = None
    """Folder or hub id of an adapter of the same method to start from, instead of from the base."""

    peft_type: ClassVar[str] = ""
    """HF PEFT's name in adapter_config.json; a name of our own where PEFT lacks the method."""

    learning_rate: ClassVar[float] = 2e-4
    """The learning rate that a recipe gets when it names none."""

    paper: ClassVar[str] = ""
    """Authors, year, arXiv id."""

    merges: ClassVar[str] = "into any 16- or 32-bit weight"
    """What it merges into, or why it does not."""

    reads_tokens: ClassVar[bool] = False
    """Whether it acts on the tokens of a text, so that a model that reads none has no use for it."""

    in_place: ClassVar[bool] = False
    """Whether it trains the base itself, so that all that needs the base as it was is refused beside it."""

    clashes: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Recipe keys that it does not go with when they are set, such as `trainer.gradient_checkpointing`: why, way out.
    """

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        """The method to attach to `model`, where that depends on the data; a planned one plans itself.

        Nothing of its own is attached yet, and nothing is attached afterwards.
        """
        return self

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        """Set how the attached adapter `name` starts, where that depends on the data or needs the tokenizer."""

    def sites(self, model: nn.Module) -> list[Site]:
        """Where the method attaches."""
        raise NotImplementedError

    def adapter(self, site: Site) -> Adapter:
        """What it puts there."""
        raise NotImplementedError

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        """All adapters at once, one per site; override where they share something.

        Under `torch.device("meta")` it must be free: a stranger's folder is compared with what is built there.
        """
        return [self.adapter(site) for site in sites]

    @property
    def needs_quantised(self) -> bool:
        """Whether its adapters make up for the quantisation of their base, so that no other base fits them."""
        return False

    @property
    def folders(self) -> list[str]:
        """Folders of adapters that it is made of, all of the base that it is attached to."""
        return []

    def groups(self, named: Mapping[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        """Optimizer groups over the trained parameters, by live name."""
        return [{"params": list(named.values()), "lr": learning_rate}]

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term added to the loss of every step."""
        return 0.0

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called after each optimizer update, gradients still in place."""

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """What adapter_config.json says of this method, in HF PEFT's keys; `adapters` by the name of their host."""
        raise NotImplementedError

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is one of this method."""
        return config.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Method:
        """The method that an adapter folder describes, with the exact names of its sites as targets.

        `shapes` is tensor name -> shape, from the header of the tensor file, without `base_model.model.`; `place` is
        the config's path for messages. Raises AdapterError when the two contradict each other.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method that adapts the linears and embeddings which a recipe names."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    """Classes beside linears that it can stand around; any other target is a mistake."""

    target_modules: str | list[str] = "all-linear"
    """`all-linear` (all but the output head), `attention`, `mlp`, a list of names, or a regular expression over
    full names."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regular expression, of modules to leave out."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the blocks to adapt; all when left out."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks, where a model has several."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained whole beside the adapters, such as a classification head."""

    def targets(self, model: nn.Module) -> list[Site]:
        """The sites that the fields above name."""
        return find(
            model,
            self.target_modules,
            exclude=self.exclude_modules,
            layers=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            saved=self.modules_to_save,
            adapts=self.adapts,
        )

    def saved(self, model: nn.Module) -> list[Site]:
        """The modules trained whole; every entry must match one."""
        return to_save(model, self.modules_to_save)

    def sites(self, model: nn.Module) -> list[Site]:
        return self.targets(model) + self.saved(model)

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        saved = {site.name for site in self.saved(model)}
        return [Trained(site.module) if site.name in saved else self.adapter(site) for site in sites]

    def placed(self, adapters: Mapping[str, Adapter], kind: type[Adapter]) -> dict[str, Any]:
        """Where it sits, as adapter_config.json says it: the exact names of the adapters of this `kind`."""
        names = sorted(name for name, adapter in adapters.items() if isinstance(adapter, kind))
        return {"target_modules": names, "modules_to_save": sorted(self.modules_to_save) or None}


def to_save(model: nn.Module, entries: list[str]) -> list[Site]:
    """The modules that `modules_to_save` names; every entry must match one."""
    found = [s for s in modules(model) if any(s.name and ends_with(s.name, e) for e in entries)]
    missing = [e for e in entries if not any(ends_with(s.name, e) for s in found)]
    if missing:
        text = "method.modules_to_save: `{}` matches no module of " + type(model).__name__
        names = ", ".join(f"`{name}`" for name, _ in model.named_children())
        raise AdapterError.of([Problem(text.format(entry), f"outermost modules: {names}") for entry in missing])
    return found


METHODS: dict[str, type[Method]] = {}
"""Every method by the name of its file."""

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Make `cls` available to recipes under the name of its file."""
    METHODS[cls.__module__.rpartition(".")[2]] = cls
    return cls


def name_of(method: Method) -> str:
    """The key of a method in recipes; a class that only reading a folder makes goes by that of the one it extends."""
    names = {cls: name for name, cls in METHODS.items()}
    return next(names[cls] for cls in type(method).__mro__ if cls in names)
