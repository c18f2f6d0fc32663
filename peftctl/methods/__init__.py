"""Every file beside this one is a method. Importing the package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from peftctl.engine.disk import load
from peftctl.engine.method import METHODS

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["METHODS", "load"]
