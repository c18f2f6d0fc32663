"""Text to image: a network learns to find the noise in pictures that belong to their texts.

    loss = mean over pictures of  w_t || prediction(x_t, t, text) - target ||^2 / elements

x_t is the picture's latent with noise in it, t a timestep by chance, the target the noise, the velocity or the flow, as
the scheduler of the pipeline says; w_t is 1, or that of min-SNR. Latents and what the text encoders make of texts are
computed once, before training; only the network is trained, a UNet or a DiT.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Count, Positive
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.fitting import OnLong
from peftctl.data.formats import Captioned, Example
from peftctl.data.prepare import Prepared
from peftctl.data.reading import RowEncoder
from peftctl.engine.method import Method
from peftctl.errors import DataError, ModelError
from peftctl.models.base import Base
from peftctl.models.diffusion import training_schedule
from peftctl.models.head import DIFFUSION, Head
from peftctl.models.pipelines import blank, predict
from peftctl.tasks.latents import Frozen, Latents, Pictured, Seen
from peftctl.tasks.noising import Noising
from peftctl.tasks.task import Batch, Task, register

OWN = ("sample", "timestep", "target", "weight")
"""What a batch has beside the conditions of the network."""


@register
@dataclass(frozen=True, kw_only=True)
class TextToImage(Task):
    """Pictures by their texts: a style or a thing, taught to a pipeline of diffusers such as Stable Diffusion."""

    talks: ClassVar[bool] = False
    needs_parsed: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("denoising_loss",)
    measures: ClassVar[frozenset[str]] = frozenset({"pictures"})

    resolution: Count | None = None
    """Pixels of each side of the square that is cut out of the middle of a picture, after its shorter side has become
    as long; the model's own, such as 512, when left out."""
    flip: bool = False
    """Whether a picture is seen as its mirror image half of the time; not for what has a left and a right."""
    min_snr_gamma: Positive | None = None
    """Let timesteps of little noise count less (Hang et al. 2023): 5 is usual; plain squared error when left out."""
    prompt: str | None = None
    """The text of rows that have none, such as `a photo of sks dog`."""

    @property
    def head(self) -> Head:
        return DIFFUSION

    def refuses(self, method: Method) -> tuple[str, str] | None:
        if method.reads_tokens:
            return "trains a network that reads pictures, and this method acts on tokens", "take `type: lora`"
        return super().refuses(method)

    def accept(self, example: Example) -> Example:
        if not isinstance(example, Captioned):
            hint = "rows are `image` and `text`; a folder of pictures with `.txt` files of the same names will do"
            raise DataError(f"{example.place}: `text_to_image` trains pictures, which this row has not", hint)
        if not example.text.strip() and self.prompt is None:
            raise DataError(
                f"{example.place}: the picture has no text", "give it one, or set `task.prompt` for all of them"
            )
        return example if example.text.strip() else replace(example, text=str(self.prompt))

    def asked(self, text: str, chat: bool) -> Example:
        return Captioned("text", b"", text)

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: the text of a picture is not split", "use `truncate` or `drop`")
        return CaptionEncoder(dataset, tokenizer)

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        """The rows as they are measured; `seen` makes of them what is trained."""
        return Latents(prepared.rows, prepared.parsed, self.frozen(base))  # type: ignore[arg-type]

    def frozen(self, base: Base) -> Frozen:
        """What the frozen parts of `base` do. Raises ModelError for settings that it has not."""
        noising = Noising(training_schedule(base.pipeline), self.min_snr_gamma)
        if noising.flow and self.min_snr_gamma is not None:
            raise ModelError(
                "trainer.task.min_snr_gamma: a model of flow matching has no signal to noise ratio", "leave it out"
            )
        scale = base.pipeline.vae_scale_factor
        resolution = self.resolution or base.model.config.sample_size * scale
        step = scale * getattr(base.model.config, "patch_size", 1)
        if resolution % step:
            text = f"trainer.task.resolution: {resolution} is no multiple of {step}, which is one place of this model"
            raise ModelError(text, f"{round(resolution / step) * step} would do")
        return Frozen(base, noising, resolution, self.flip)

    def seen(self, rows: Sequence[Encoded], seed: int, step: int) -> Sequence[Encoded]:
        assert isinstance(rows, Latents)
        return Seen(rows, seed, step)

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """`sample`, `target` [n, channels, height, width], `timestep`, `weight` [n], and conditions [n, ...].

        n is the draws of all rows together; those of a row count as much as one. Empty without rows.
        """
        drawn = [(row.conditions, row.noisy) for row in rows if isinstance(row, Pictured)]
        seen = [(conditions, one, len(noisy)) for conditions, noisy in drawn for one in noisy]
        if not seen:
            return {}
        return {
            "sample": torch.stack([one.sample for _, one, _ in seen]),
            "timestep": torch.stack([one.timestep for _, one, _ in seen]),
            "target": torch.stack([one.target for _, one, _ in seen]),
            "weight": torch.tensor([one.weight / draws for _, one, draws in seen]),
            **{name: torch.stack([conditions[name] for conditions, _, _ in seen]) for name in seen[0][0]},
        }

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        network: Any = getattr(model, "module", model)
        if not batch:  # a rank without rows takes part in the forward
            sample, timestep, conditions = (moved(one, network) for one in blank(network))
            return {"loss": 0.0 * predict(model, sample, timestep, conditions).float().sum()}
        return {"loss": self.losses(model, batch).sum()}

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each draw [n] of a batch, in float32."""
        network: Any = getattr(model, "module", model)
        conditions = {name: value for name, value in batch.items() if name not in OWN}
        sample, conditions = (moved(one, network) for one in (batch["sample"], conditions))
        timestep = batch["timestep"].to(network.device)  # bfloat16 would round 993.7 to 992
        predicted = predict(model, sample, timestep, conditions).float()
        errors = F.mse_loss(predicted, batch["target"], reduction="none").flatten(1).mean(dim=1)
        return batch["weight"] * errors

    def weight(self, row: Encoded) -> int:
        return 1


def moved(value: Any, network: Any) -> Any:
    """Tensors where the network is; those that are no whole numbers in its dtype."""
    if isinstance(value, dict):
        return {name: moved(one, network) for name, one in value.items()}
    return value.to(network.device, network.dtype if value.is_floating_point() else value.dtype)


class CaptionEncoder:
    """Texts of pictures as the text encoder reads them."""

    def __init__(self, dataset: Dataset, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.max_length: int = tokenizer.model_max_length
        self.on_long: OnLong = dataset.on_long
        self.stop_ids: set[int] = set()
        self.spelled = 0

    @property
    def splits_special_tokens(self) -> bool:
        return True

    def encode(self, row: Captioned) -> list[Encoded]:
        """A row; none when its text is too long and dropped. Raises DataError for one too long."""
        ids = self.prompt(row)
        cut = max(len(ids) - self.max_length, 0)
        if cut and self.on_long == "drop":
            return []
        if cut and self.on_long == "error":
            text = f"{row.place}: {len(ids)} tokens of text, and the model reads {self.max_length}"
            raise DataError(text, "shorten it, or choose `on_long: truncate` or `drop`")
        kept = array("i", ids[: self.max_length])
        return [Encoded(kept, ((0, len(kept)),), truncated=cut > 0, cut=cut)]

    def compared(self, row: Captioned, whole: bool) -> Encoded:
        raise DataError(f"{row.place}: the texts of pictures are not compared")

    def prompt(self, row: Captioned) -> list[int]:
        ids: list[int] = self.tokenizer(row.text, truncation=False, verbose=False)["input_ids"]
        return ids
