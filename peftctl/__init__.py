"""peftctl: one recipe for fine-tuning, from data to a merged model.

The engine attaches adapters to a model in place; the object stays yours:

    import peftctl
    method = peftctl.METHODS["lora"](r=8)
    peftctl.attach(model, method)
    ...                              # train it with any loop
    peftctl.save(model, "my-adapter")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "peftctl.methods",
    "activate": "peftctl.engine.attach",
    "attach": "peftctl.engine.attach",
    "bare": "peftctl.engine.attach",
    "detach": "peftctl.engine.attach",
    "load": "peftctl.methods",
    "merge": "peftctl.engine.merging",
    "rows": "peftctl.engine.per_row",
    "save": "peftctl.engine.disk",
    "train": "peftctl.verbs.train",
    "unmerge": "peftctl.engine.merging",
    "PeftctlError": "peftctl.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Names come from their rooms when first used, so that `import peftctl` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module `peftctl` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
