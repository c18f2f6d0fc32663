"""What a row is, what the loss is and what is measured: one file for each task. Importing the package finds them."""

from importlib import import_module
from pkgutil import iter_modules

from peftctl.tasks.task import TASKS, Task

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["TASKS", "Task"]
