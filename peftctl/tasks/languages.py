"""Tokenizers that write each language with a token of its own: mBART's, mBART-50's, NLLB's.

The token stands before or behind a text, as the tokenizer has it for sources. Targets are tokenised as sources of their
own language would be, which in these three is the same thing.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from peftctl.errors import DataError

SHOWN = 6
"""Codes that are told by name."""


def of_languages(tokenizer: Any, source: str, target: str) -> tuple[Any, Any]:
    """A tokenizer for sources and one for targets; the same one twice where it knows no languages.

    Raises DataError where it knows languages and nobody says which, where it does not, and for a code that it lacks.
    """
    wanted = {"source_language": source, "target_language": target}
    if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        for key, code in wanted.items():
            if code:
                raise DataError(f"trainer.task.{key}: the tokenizer has no tokens of languages", "leave it out")
        return tokenizer, tokenizer
    known = codes(tokenizer)
    for key, code in wanted.items():
        place, near = f"trainer.task.{key}", difflib.get_close_matches(code, known, SHOWN, 0.4)
        if not code:
            text = f"{place}: missing; the tokenizer writes each language with a token of its own"
            raise DataError(text, f"one of its {len(known)} codes, such as {listed(known[:SHOWN])}")
        if code not in known:
            raise DataError(
                f"{place}: the tokenizer has no language `{code}`", f"such as {listed(near or known[:SHOWN])}"
            )
    found = []
    for code in (source, target):
        one = copy.deepcopy(tokenizer)
        one.src_lang = code
        found.append(one)
    return found[0], found[1]


def codes(tokenizer: Any) -> list[str]:
    """The languages that it has tokens for."""
    named = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "extra_special_tokens", [])
    return [code for code in named if tokenizer.convert_tokens_to_ids(code) != tokenizer.unk_token_id]


def opening(tokenizer: Any, target: str) -> dict[str, int]:
    """What `generate` has to be told for an answer in the language `target`; nothing where there are no languages.

    The language comes first in what the decoder reads: mBART's targets end with it, so it stands in place of the start
    token; the others' begin with it.
    """
    if not target:
        return {}
    token = tokenizer.convert_tokens_to_ids(target)
    begins = tokenizer("a")["input_ids"][0] == token
    return {"forced_bos_token_id" if begins else "decoder_start_token_id": token}


def listed(found: list[str]) -> str:
    """Codes for a message."""
    return ", ".join(f"`{code}`" for code in found)
