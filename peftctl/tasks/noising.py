"""How latents become noisy in training, and what a network is to find in them.

x a latent, e Gaussian noise, t a timestep, a_t the product of 1 - beta up to it:

    noisy    x_t = sqrt(a_t) x + sqrt(1 - a_t) e                   Ho et al. 2020, arXiv:2006.11239 (eq. 4)
    target   e; or x; or v = sqrt(a_t) e - sqrt(1 - a_t) x         Salimans & Ho 2022, arXiv:2202.00512 (app. D)
    weight   min(SNR, gamma) / SNR for e, min(SNR, gamma) for x, min(SNR, gamma) / (SNR + 1) for v,
             SNR = a_t / (1 - a_t)                                 Hang et al. 2023, arXiv:2303.09556 (eq. 5, sec. 3.4)

and of flow matching, with s_t from 1 (noise) to 0:

    noisy    x_t = (1 - s_t) x + s_t e,   target   e - x           Lipman et al. 2023, arXiv:2210.02747 (eq. 22)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Noisy(NamedTuple):
    """A latent with noise in it."""

    sample: Tensor
    """[channels, height, width]"""
    timestep: Tensor
    """As the network is told it: a scalar."""
    target: Tensor
    """[channels, height, width]"""
    weight: float
    """What the squared error counts."""


@dataclass(frozen=True)
class Noising:
    """How noise is added for one network."""

    scheduler: Any
    """DDPM's or flow matching's, of diffusers."""
    min_snr_gamma: float | None = None

    @property
    def flow(self) -> bool:
        """Whether it is that of flow matching."""
        return hasattr(self.scheduler, "sigmas")

    @property
    def steps(self) -> int:
        """How many timesteps there are."""
        return int(self.scheduler.config.num_train_timesteps)

    def drawn(self, generator: torch.Generator) -> int:
        """A timestep by chance: each alike, or of flow matching those in the middle more often than others.

        The latter as Esser et al. 2024, arXiv:2403.03206 (sec. 3.1): the logistic function of a normal number.
        """
        if not self.flow:
            return int(torch.randint(self.steps, (1,), generator=generator))
        return int(torch.randn(1, generator=generator).sigmoid() * self.steps)

    def noisy(self, x: Tensor, noise: Tensor, number: int) -> Noisy:
        """The latent x [channels, height, width] with `noise` of its shape, at the timestep of this number."""
        if self.flow:
            sigma, time = self.scheduler.sigmas[number], self.scheduler.timesteps[number]
            return Noisy((1 - sigma) * x + sigma * noise, time, noise - x, 1.0)
        a = self.scheduler.alphas_cumprod[number]
        predicted = self.scheduler.config.prediction_type
        targets = {"epsilon": noise, "sample": x, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x}
        sample = a.sqrt() * x + (1 - a).sqrt() * noise
        return Noisy(sample, torch.tensor(number), targets[predicted], self.weight(float(a / (1 - a)), predicted))

    def weight(self, snr: float, predicted: str) -> float:
        """What the squared error counts where the signal is `snr` times the noise."""
        if self.min_snr_gamma is None:
            return 1.0
        least = min(snr, self.min_snr_gamma)
        if predicted == "v_prediction":
            return least / (snr + 1)
        if predicted == "sample":
            return least
        return least / snr if snr else 1.0  # a network that sees noise alone cannot be asked for the noise anyway


def generator(*key: object) -> torch.Generator:
    """Chance that is a function of `key` alone, whatever the machine has drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
