"""How well a model finds the noise in pictures."""

import numpy as np

from peftctl.evaluation.metric import Metric, ratio

denoising_loss = Metric(
    name="denoising_loss",
    about="mean squared error of what is predicted of noisy pictures, at fixed noise and timesteps",
    needs="pictures",
    better="lower",
    statistics=lambda seen: np.stack([seen.errors, np.ones_like(seen.errors)], axis=1),
    figure=ratio,
)
