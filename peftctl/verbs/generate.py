"""`peftctl generate`: what the tuned model, or its base, says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftctl.data.dataset import Dataset
from peftctl.data.template import find
from peftctl.errors import RunError
from peftctl.evaluation.generation import generate as answers
from peftctl.exports.companions import TEMPLATE
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.allocator import keep_memory
from peftctl.models.head import DIFFUSION
from peftctl.models.quiet import Say
from peftctl.verbs.draw import draw
from peftctl.verbs.events import Listen, silent, speaker
from peftctl.verbs.rows import HERE
from peftctl.verbs.target import Target, open_target


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
    output: Path | None = None,
    listen: Listen = silent,
) -> str:
    """The answer to `text`: greedy, unless `sample` or several `beams` say otherwise; its class, of a classifier.

    A run trained on conversations takes `text` as the user's message; other runs go on from it. A model that writes
    about pictures takes it as the path of one; a model that draws writes its picture to `output`, and the answer is
    that path. With `base` the adapter is left out. Raises PeftctlError.
    """
    keep_memory()
    found = open_target(target)
    found.check_base()
    say = speaker(listen)
    if found.head is DIFFUSION:
        return draw(found, text, output, base=base, seed=seed, say=say)
    if output is not None:
        raise RunError(f"`--output {output}`: this model writes texts, which are printed", "leave it out")
    loaded = models.load(found.model, found.head, say=say)
    if found.adapter is not None and not base:
        load(loaded.model, found.adapter)
    task = found.task.judged
    if (chosen := task.classified(text, loaded)) is not None:
        if sample or beams > 1:
            what = "`--sample`, `--beams`: this model chooses among classes, it writes no text"
            raise RunError(what, "leave them out")
        return chosen
    template = template_of(found, loaded, say)
    dataset = found.recipe.dataset if found.recipe else Dataset(train="nothing")
    encoder = task.encoder(replace(dataset, max_length=1 << 30), loaded.tokenizer, template)
    encoder.stop_ids.update(found.folder.read_provenance().get("stop_ids", []) if found.folder else [])
    row = task.asked(text, chat=template is not None)
    how: dict[str, Any] = {"num_beams": beams}
    if sample:
        torch.manual_seed(seed)
        how |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    encoder = task.ready(encoder, loaded)
    return answers(loaded.model, [row], encoder, max_new_tokens, batch_size=1, **how)[0]


def template_of(found: Target, loaded: models.Base, say: Say) -> str | None:
    """The chat template to ask with: the adapter's; the base's own where there is no adapter; else none."""
    if found.adapter is not None:
        trained = found.adapter / TEMPLATE
        return trained.read_text(encoding="utf-8") if trained.is_file() else None
    return find("tokenizer", loaded.tokenizer, HERE, say) if loaded.tokenizer.chat_template else None
