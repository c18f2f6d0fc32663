"""`peftctl generate`: what the tuned model, or its base, says."""

from __future__ import annotations

from typing import Any

import torch

from peftctl.data.encode import Encoder
from peftctl.data.template import find
from peftctl.evaluation.generation import continuations
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.allocator import keep_memory
from peftctl.verbs.events import Listen, silent, speaker
from peftctl.verbs.rows import HERE
from peftctl.verbs.target import open_target


def generate(
    target: str,
    text: str,
    *,
    base: bool = False,
    sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    beams: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    listen: Listen = silent,
) -> str:
    """The answer to `text`: greedy, unless `sample` or several `beams` say otherwise.

    A run trained on conversations takes `text` as the user's message; other runs go on from it. With `base` the
    adapter is left out. Raises PeftctlError.
    """
    keep_memory()
    found = open_target(target)
    found.check_base()
    say = speaker(listen)
    loaded = models.load(found.model, say=say)
    if found.adapter is not None and not base:
        load(loaded.model, found.adapter)
    chat = found.adapter is not None and (found.adapter / "chat_template.jinja").is_file()
    trained = (found.adapter / "chat_template.jinja").read_text(encoding="utf-8") if chat and found.adapter else None
    template = trained or (find("tokenizer", loaded.tokenizer, HERE, say) if loaded.tokenizer.chat_template else None)
    is_chat = chat or (found.adapter is None and template is not None)
    encoder = Encoder(loaded.tokenizer, template, 1 << 30, system=found.recipe.dataset.system if found.recipe else None)
    encoder.stop_ids.update(found.folder.read_provenance().get("stop_ids", []) if found.folder else [])
    asked = [{"role": "user", "content": text}]
    prompt = encoder.chat_prompt(asked, None, "messages") if is_chat else encoder.text_prompt(text)
    how: dict[str, Any] = {"num_beams": beams}
    if sample:
        torch.manual_seed(seed)
        how |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return continuations(loaded.model, [prompt], encoder, max_new_tokens, **how)[0]
