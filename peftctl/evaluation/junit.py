"""Gates as a JUnit file, the form of test results that CI servers show: one test case for each limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from peftctl.evaluation.judge import Verdict

FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML 1.0 document may hold, not even escaped."""


def junit(verdicts: Sequence[Verdict], title: str, when: str, seconds: float) -> bytes:
    """The content of the file. `when` is an ISO time, `seconds` what the evaluation took."""
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(sum(one.status == "failed" for one in verdicts)),
        "errors": "0",
    }
    duration = f"{seconds:.3f}"
    root = ElementTree.Element("testsuites", {"name": "peftctl eval", **counts, "time": duration})
    about = {"skipped": "0", "time": duration, "timestamp": when.partition("+")[0], "hostname": "localhost"}
    suite = ElementTree.SubElement(root, "testsuite", {"name": clean(title), **counts, **about})
    for one in verdicts:
        place = ".".join(part for part in ("gates", one.set) if part)
        case = ElementTree.SubElement(
            suite, "testcase", {"name": clean(one.name), "classname": clean(place), "time": "0"}
        )
        if one.status == "failed":
            failure = ElementTree.SubElement(case, "failure", {"message": clean(one.words), "type": "gate"})
            failure.text = clean(f"{one.name}\n{one.words}")
        else:
            ElementTree.SubElement(case, "system-out").text = clean(f"{one.status}: {one.words}")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def clean(text: str) -> str:
    """`text` with what XML cannot hold, or a terminal would obey, as visible escapes."""
    return FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)
