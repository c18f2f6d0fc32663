"""Which base an adapter was trained on: a fingerprint in a file of our own, beside HF PEFT's files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftctl.errors import RunError
from peftctl.models.folder import fingerprint, read_json

ORIGIN = "peftctl.json"
"""Not among the files that HF PEFT reads."""


def origin(base: Path, name: str) -> dict[str, Any]:
    """What is remembered of the model in the folder `base`, called `name`."""
    return {"name": name, **fingerprint(base)}


def origin_bytes(base: Path, name: str, labels: Sequence[str] = ()) -> bytes:
    """What `peftctl.json` holds for an adapter of that model; `labels` in the order of the logits of a classifier."""
    record = {"base": origin(base, name), **({"labels": list(labels)} if labels else {})}
    return json.dumps(record, indent=2, sort_keys=True).encode()


def labels_in(adapter: Path) -> tuple[str, ...]:
    """The labels of the classifier that the folder `adapter` is for; none where it does not say them.

    Raises RunError where they are no different texts: a stranger may have written anything.
    """
    if not (adapter / ORIGIN).is_file():
        return ()
    labels = read_json(adapter / ORIGIN, str(adapter)).get("labels", [])
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not texts or len(set(labels)) != len(labels):
        raise RunError(f"{adapter / ORIGIN}: `labels` is no list of different texts", "is the folder damaged?")
    return tuple(labels)


def refuse_other_base(then: Mapping[str, Any], base: Path, name: str, place: Path) -> None:
    """Raise RunError when the model in the folder `base`, called `name`, is not the one that `then` remembers."""
    now = fingerprint(base)
    # another commit of the hub may bring the same model
    changed = [key for key in ("config", "weights") if key in then and then[key] != now[key]]
    if changed:
        hint = f"its {' and '.join(changed)} differ"
        if re.fullmatch(r"[0-9a-f]{40}", str(then.get("commit"))):  # a stranger may have written anything
            hint += f"; set `model.revision={then['commit']}`"
        raise RunError(f"{name}: not the base that `{place}` was trained on", hint)


def refuse_stranger(adapter: Path, base: Path, name: str) -> None:
    """Raise RunError when the folder `adapter` says that it was trained on another model; most say nothing."""
    if (adapter / ORIGIN).is_file():
        then = read_json(adapter / ORIGIN, str(adapter)).get("base")
        refuse_other_base(then if isinstance(then, dict) else {}, base, name, adapter)
