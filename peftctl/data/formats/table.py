"""Every form of rows, in the order of guessing.

First what no other form is named like: `chosen` and `rejected`, then lists of messages. Behind them, more keys before
fewer: a row with `text` and `label` is more than a text.
"""

from __future__ import annotations

from peftctl.data.formats.alpaca import ALPACA
from peftctl.data.formats.form import Form, Format
from peftctl.data.formats.image_text import IMAGE_TEXT
from peftctl.data.formats.messages import MESSAGES
from peftctl.data.formats.preference import PREFERENCE
from peftctl.data.formats.prompt_completion import PROMPT_COMPLETION
from peftctl.data.formats.sharegpt import SHAREGPT
from peftctl.data.formats.source_target import SOURCE_TARGET
from peftctl.data.formats.text import TEXT
from peftctl.data.formats.text_label import TEXT_LABEL
from peftctl.data.formats.tokens_tags import TOKENS_TAGS
from peftctl.data.formats.unpaired_preference import UNPAIRED_PREFERENCE

FORMS: dict[Format, Form] = {
    form.name: form
    for form in (
        PREFERENCE,
        MESSAGES,
        SHAREGPT,
        UNPAIRED_PREFERENCE,
        PROMPT_COMPLETION,
        ALPACA,
        SOURCE_TARGET,
        IMAGE_TEXT,
        TOKENS_TAGS,
        TEXT_LABEL,
        TEXT,
    )
}
