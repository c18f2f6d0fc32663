"""The configuration of a base model, without its weights and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftctl.errors import ModelError
from peftctl.models.folder import CONFIG, read_json, vet
from peftctl.models.gguf import converted
from peftctl.models.known import known
from peftctl.models.quiet import quiet, reason
from peftctl.models.source import resolve


def architecture(place: str, revision: str | None = None) -> Any:
    """The transformers configuration of a folder, a .gguf file, or a hub id that is well known or in the hub's cache.

    Raises ModelError for anything else.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    found = resolve(place)
    if isinstance(found, str):
        cached = try_to_load_from_cache(found, "config.json", revision=revision)
        if isinstance(cached, str):
            found = Path(cached).parent
        elif found in known():
            made = AutoConfig.for_model(**known()[found])
            if made.is_encoder_decoder and getattr(made, "decoder_start_token_id", None) is None:
                made.decoder_start_token_id = made.pad_token_id or 0  # T5's own; BART's kin say theirs
            return made
        else:
            raise ModelError(
                f"{place}: its architecture is not known here, and no network is asked",
                "name a folder that holds its `config.json`, or a known model of the same family",
            )
    if not found.is_dir():
        found = converted(found) or found  # its configuration is read in no time
    try:
        with quiet():
            if found.is_dir():
                if (found / CONFIG).is_file():
                    vet(read_json(found / CONFIG, place), f"{place}/{CONFIG}")
                return AutoConfig.from_pretrained(found, trust_remote_code=False, local_files_only=True)
            return AutoConfig.from_pretrained(found.parent, gguf_file=found.name, local_files_only=True)
    except ModelError:
        raise
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        raise ModelError(f"{place}: its configuration cannot be read: {reason(error)}") from error
