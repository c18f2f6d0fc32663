"""What the frozen parts of a pipeline make of pictures and their texts, computed once, and drawn from in training.

A draw of a picture is what one step sees of it: a latent of the distribution that the VAE gives, noise, a timestep. It
is a function of the run's seed, the step and the number of the row; where rows are measured it is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, overload

import torch
from torch import Tensor

from peftctl.data.fitting import Encoded
from peftctl.data.formats import Captioned
from peftctl.data.pictures import rgb
from peftctl.models.base import Base
from peftctl.models.diffusion import lent, quiet_diffusers
from peftctl.models.pipelines import Conditions, kind_of, of_picture
from peftctl.tasks.noising import Noising, Noisy, generator
from peftctl.tasks.squares import square

MEASURED = 4
"""Timesteps, evenly spread, at which a picture is measured."""

TEXTS = 8
"""Texts that are encoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A picture, or its mirror image, as the VAE has it: mean and deviation [channels, height, width], float32."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictured(Encoded):
    """A row with its picture."""

    views: tuple[View, ...] = ()
    conditions: Conditions = field(default_factory=dict)
    """What the network reads beside the picture, each without the axis of rows."""
    draw: Callable[[], tuple[Noisy, ...]] = tuple
    """Draws what is seen of it, which takes longer than anything else that is asked of a row."""

    @property
    def noisy(self) -> tuple[Noisy, ...]:
        """What is seen of it: one draw in training, `MEASURED` of them where it is measured."""
        return self.draw()


@dataclass(frozen=True)
class Frozen:
    """What turns pictures and texts into what the network reads."""

    base: Base
    noising: Noising
    resolution: int
    """Pixels of the square that is cut out of the middle of each picture."""
    mirrored: bool
    """Whether mirror images are computed too."""

    def conditions(self, texts: Sequence[str]) -> dict[str, Conditions]:
        """What the text encoders make of each different text."""
        pipeline = self.base.pipeline
        kind = kind_of(pipeline)
        different = list(dict.fromkeys(texts))
        encoders = [one for name in kind.encoders if (one := getattr(pipeline, name)) is not None]
        found: dict[str, Conditions] = {}
        with torch.no_grad(), quiet_diffusers(), lent(encoders, self.base.device):
            for start in range(0, len(different), TEXTS):
                part = different[start : start + TEXTS]
                made = kind.conditions(pipeline, part, self.base.device)
                for row, text in enumerate(part):
                    found[text] = {name: value[row].cpu() for name, value in made.items()}
        return found

    def views(self, pixels: Tensor) -> tuple[View, ...]:
        """The picture [3, height, width], from -1 to 1, and perhaps its mirror image; the VAE is on the device."""
        both = torch.stack([pixels, pixels.flip(-1)] if self.mirrored else [pixels]).to(self.base.device)
        with torch.no_grad():
            found = self.base.pipeline.vae.encode(both).latent_dist
        return tuple(
            View(mean=mean.cpu(), deviation=std.cpu()) for mean, std in zip(found.mean, found.std, strict=True)
        )

    def latent(self, view: View, chance: torch.Generator) -> Tensor:
        """One latent [channels, height, width], scaled as the network knows it."""
        config: Any = self.base.pipeline.vae.config
        x = view.mean + view.deviation * torch.randn(view.mean.shape, generator=chance)
        return x.sub(config.shift_factor or 0.0).mul(config.scaling_factor)

    def drawn(self, views: Sequence[View], *key: object) -> tuple[Noisy, ...]:
        """What one step sees of a picture; `key` is all that chance depends on."""
        chance = generator(*key)
        view = views[int(torch.randint(len(views), (1,), generator=chance))]
        number = self.noising.drawn(chance)
        return (self.seen(view, number, chance),)

    def measured(self, view: View, number: int) -> tuple[Noisy, ...]:
        """What is measured of the picture of row `number`: at timesteps that are spread, each counting the same."""
        chance = generator("measured", number)
        steps = [int(self.noising.steps * (part + 0.5) / MEASURED) for part in range(MEASURED)]
        return tuple(self.seen(view, step, chance)._replace(weight=1.0) for step in steps)

    def seen(self, view: View, number: int, chance: torch.Generator) -> Noisy:
        x = self.latent(view, chance)
        return self.noising.noisy(x, torch.randn(x.shape, generator=chance), number)


class Latents(Sequence[Encoded]):
    """Prepared rows with their pictures, which are encoded when the first is asked for."""

    def __init__(self, rows: Sequence[Encoded], examples: Sequence[Captioned], frozen: Frozen) -> None:
        assert len(rows) == len(examples), "a picture has one row"
        self.rows, self.examples, self.frozen = rows, examples, frozen

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Pictured: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Pictured | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        row = self.encoded[number]
        return replace(row, draw=partial(self.frozen.measured, row.views[0], number))

    @cached_property
    def encoded(self) -> list[Pictured]:
        """Every row, nothing of it drawn yet."""
        frozen = self.frozen
        conditions = frozen.conditions([example.text for example in self.examples])
        made = []
        with lent([frozen.base.pipeline.vae], frozen.base.device):
            for row, example in zip(self.rows, self.examples, strict=True):
                pixels, size, corner = square(rgb(example), frozen.resolution)
                own = of_picture(frozen.base.model, size, corner, frozen.resolution)
                views, texts = frozen.views(pixels), conditions[example.text]
                made.append(Pictured(row.ids, row.spans, row.truncated, row.cut, views=views, conditions=texts | own))
        return made


@dataclass(frozen=True)
class Seen(Sequence[Encoded]):
    """The rows as one step of training sees them."""

    latents: Latents
    seed: int
    step: int

    def __len__(self) -> int:
        return len(self.latents)

    @overload
    def __getitem__(self, index: int) -> Pictured: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Pictured | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        row = self.latents.encoded[number]
        return replace(row, draw=partial(self.latents.frozen.drawn, row.views, self.seed, self.step, number))
