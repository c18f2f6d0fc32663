"""What `peftctl methods` knows: every method with its paper, its fields, what it merges into."""

from __future__ import annotations

import re

import pytest

from peftctl.errors import RecipeError
from peftctl.methods import METHODS
from peftctl.verbs.methods import describe


def test_all_are_listed_in_a_line():
    listed = describe()
    assert [method["name"] for method in listed] == sorted([*METHODS, "qlora"])
    assert all(10 < len(f"{method['name']} {method['title']}") < 100 for method in listed)
    assert len({method["title"] for method in listed}) == len(listed)


@pytest.mark.parametrize("name", [*METHODS, "qlora"])
def test_a_page_says_what_a_user_asks(name):
    method = describe(name)
    cls = METHODS.get(name, METHODS["lora"])
    assert 0 < method["learning_rate"] < 1
    assert method["merges"] == cls.merges
    assert re.match(r"into (any|the) |not: ", method["merges"])
    assert method["peft"] in (cls.peft_type, None)
    assert name in ("full", "layers") or re.search(r"\d{4}", method["paper"])
    first = method["page"].partition("\n\n")[0]
    assert method["paper"].partition(",")[0] in " ".join(method["page"].split()), first
    for field in method["fields"]:
        assert len(field["doc"]) > 10, field["name"]
        assert field["doc"].endswith((".", ")", '"')), field["name"]


def test_an_unknown_name():
    with pytest.raises(RecipeError, match="no such method") as caught:
        describe("lroa")
    assert caught.value.problems[0].hint == "did you mean `lora`?"
