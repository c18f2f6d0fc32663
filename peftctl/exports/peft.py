"""An adapter to give away: HF PEFT's folder, with a model card and without the paths of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.engine.tensor_file import FILES
from peftctl.exports.card import Facts, card, public
from peftctl.exports.companions import ADAPTER_FILES, copy_files
from peftctl.exports.diffusers_lora import write_lora
from peftctl.exports.lineage import digest
from peftctl.models.origin import ORIGIN
from peftctl.training import filesystem
from peftctl.training.storage import staged


def export_peft(adapter: Path, output: Path, *, facts: Facts) -> dict[str, Any]:
    """Write the adapter in the folder `adapter` to `output`, which must not exist; returns its digest and its bytes.

    Raises AdapterError for what is no adapter or a damaged one, StorageError when the disk refuses or `output` exists.
    """
    config, identity = read_config(adapter), digest(adapter)
    config["base_model_name_or_path"] = public(str(config.get("base_model_name_or_path") or facts.base))
    text = card(replace(facts, merged=False))
    with staged(output) as folder:
        filesystem.write(folder / CONFIG, [json.dumps(config, indent=2, sort_keys=True).encode()])
        filesystem.write(folder / "README.md", [text.encode()])
        copy_files(adapter, folder, (*FILES, ORIGIN, *ADAPTER_FILES))
        write_lora(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
    return {"sha256": identity, "bytes": size}
