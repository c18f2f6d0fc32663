"""Chat templates of strangers: programs in a sandbox, bounded in time, memory and what they write."""

from __future__ import annotations

import json
import shutil

import pytest
from hostile.attack import Attack

REFUSED = r"chat template refuses this conversation"
ENDLESS = r"chat template does not come to an end"

DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"

TEMPLATES = {
    # CVE-2024-34359 (llama-cpp-python), CVE-2026-5760 (SGLang), Jinja2 CVE-2024-56201, CVE-2024-56326, CVE-2025-27516
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", REFUSED),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", REFUSED),
    "globals of a namespace": ("{{ namespace.__init__.__globals__.sys.modules }}", REFUSED),
    "a namespace's own": ("{% set n = namespace(__class__=1) %}{{ n.__init__.__globals__.os.system('id') }}", REFUSED),
    "attr": ("{{ (messages|attr('__class__'))|attr('__base__') }}", "the stop token is never trained"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", REFUSED),
    "format by a filter": ("{{ ['{0.__class__.__bases__}']|map('format', messages)|list }}", None),
    "format kept in a name": ("{% set f = '{0.__class__.__mro__[1].__subclasses__}'.format %}{{ f(1)() }}", REFUSED),
    "format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", REFUSED),
    "the code of a function": ("{{ raise_exception.__code__.co_consts }}", REFUSED),
    "the globals of a function": ("{{ raise_exception.__globals__['__builtins__']['__import__']('os') }}", REFUSED),
    "the environment": ("{{ self.__init__.__globals__ }}", REFUSED),
    "a generator": ("{{ (messages|map('string')).gi_frame.f_globals }}", REFUSED),
    "an import": ("{% import 'os' as os %}{{ os.system('id') }}", REFUSED),
    "an include": ("{% include '/etc/passwd' %}", REFUSED),
    "another template": ("{% extends '/etc/passwd' %}", REFUSED),
    "a statement of Python": ("{% do messages.append(1) %}", "not a Jinja template"),
    "changed messages": ("{{ messages.append(1) }}", REFUSED),
    "changed text": ("{{ messages[0].update({'content': 'evil'}) }}", REFUSED),
    # the sandbox alone lets these through
    "a thousand million letters": ("{{ 'a' * 10**9 }}", ENDLESS),
    "more letters than memory": ("{{ 'a' * 10**14 }}", ENDLESS),
    "letters by a filter": ("{{ 'a'|center(10**9) }}", ENDLESS),
    "letters by a format": ("{{ '%1000000000d' % 1 }}", ENDLESS),
    "letters twice and twice": (DOUBLING, ENDLESS),
    "loops in loops": ("{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4, ENDLESS),
    "loops that write": ("{% for a in range(99999) %}" * 3 + "evil" + "{% endfor %}" * 3, ENDLESS),
    "a long range": ("{{ range(10**9)|list }}", REFUSED),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSED),
    "a macro twice of itself": (CALLS, ENDLESS),
    "a number of all digits": ("{{ 9**(9**9) }}", ENDLESS),
    "lipsum": ("{{ lipsum(10**9) }}", f"{REFUSED}|{ENDLESS}"),
    "a megabyte for a word": ("{% for a in range(60000) %}{{ 'a' * 1000 }}{% endfor %}", ENDLESS),
    "many parentheses": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "nested too deep"),
    "many blocks": ("{% if 1 %}" * 3_000 + "{% endif %}" * 3_000, f"{REFUSED}|nested too deep|{ENDLESS}"),
    "two megabytes": ("{# " + "x" * (2 << 20) + " #}", r"2,097,208 characters, more than 1,048,576"),
    "no template": ("{% for", r"dataset.chat_template:1: not a Jinja template"),
    "a division by nothing": ("{{ 1 // 0 }}", REFUSED),
    "escapes in a complaint": ("{{ raise_exception('\x1b]52;c;eA==\x07' ~ '\x1b[2J') }}", REFUSED),
}


SLOW = ("loops that write", "lipsum", "a macro twice of itself", "letters twice and twice")
"""Those that take their second, as others do."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TEMPLATES]
)
def test_a_template_is_refused(name: str, attack: Attack):
    template, telling = TEMPLATES[name]
    attack.write("evil.jinja", template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    attack.rows(attack_rows())
    attack.recipe(dataset={"chat_template": "evil.jinja"})
    if telling is None:  # it does nothing, so that the rows are all that comes out
        attack.harmless("data", "recipe.yaml", code=None)
        return
    attack.refused("train", "recipe.yaml", telling=telling, within=5.0, swelling=700)


def attack_rows() -> list[dict[str, object]]:
    """One conversation: what cannot be rendered once need not be tried for more."""
    return [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]


def test_a_template_of_the_model_is_no_better(attack: Attack):
    base = attack.work / "base"
    shutil.copytree(attack.base, base)
    (base / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('id') }}")
    attack.recipe(base=base)
    attack.refused("train", "recipe.yaml", telling=REFUSED)
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'a' * 10**9 }}"
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    attack.refused("train", "recipe.yaml", telling=ENDLESS, swelling=700)


def test_a_template_that_waits_for_one_row(attack: Attack):
    trap = "{% if m.content == 'now' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    body = "{% for m in messages %}<bos>{{ m.content }}<eos>" + trap + "{% endif %}{% endfor %}"
    attack.write("evil.jinja", body)
    rows = attack_rows()
    attack.rows([*rows * 5, {"messages": [{"role": "user", "content": "now"}, {"role": "assistant", "content": "a"}]}])
    attack.recipe(dataset={"chat_template": "evil.jinja"})
    attack.refused("train", "recipe.yaml", telling=rf"rows.jsonl:6: the {ENDLESS}", within=6.0)


def test_a_device_for_a_template(attack: Attack):
    (attack.work / "evil.jinja").symlink_to("/dev/zero")
    attack.recipe(dataset={"chat_template": "evil.jinja"})
    attack.refused("train", "recipe.yaml", telling="dataset.chat_template: a template of", within=1.0)
