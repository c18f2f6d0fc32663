"""Forms of rows: one file each, and what a row of each is once it is read. A new form is a file and a line of FORMS."""

from peftctl.data.formats.conversation import ROLES
from peftctl.data.formats.form import Form, Format
from peftctl.data.formats.guess import check, guess
from peftctl.data.formats.kinds import (
    Captioned,
    Chat,
    Example,
    Feedback,
    Labelled,
    Message,
    Pair,
    Parsed,
    Preference,
    Tagged,
    Text,
    Translated,
)
from peftctl.data.formats.table import FORMS

__all__ = [
    "FORMS",
    "ROLES",
    "Captioned",
    "Chat",
    "Example",
    "Feedback",
    "Form",
    "Format",
    "Labelled",
    "Message",
    "Pair",
    "Parsed",
    "Preference",
    "Tagged",
    "Text",
    "Translated",
    "check",
    "guess",
]
