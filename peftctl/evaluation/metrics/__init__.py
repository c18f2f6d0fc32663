"""Every file beside this one holds metrics of one family. Importing the package finds them all."""

from importlib import import_module
from pkgutil import iter_modules

from peftctl.evaluation.metric import Metric

METRICS: dict[str, Metric] = {
    found.name: found
    for file in iter_modules(__path__)
    for found in vars(import_module(f"{__name__}.{file.name}")).values()
    if isinstance(found, Metric)
}
"""Metrics by name."""
