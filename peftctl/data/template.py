"""Chat templates: the tokenizer's own, ours by name, or a Jinja file; all end up as one Jinja text.

Ours (`templates/*.jinja`) read two variables more than others: `bos`, the tokenizer's first token when it puts one
before every text by itself, else nothing; and `stop`, which closes the assistant's turns: the token of that template
where the tokenizer has it as a special token, else its `eos_token`. A stop token that falls apart into ordinary tokens
would be learned badly and stop nothing. Both are set in a first line written here, so that what is saved beside an
adapter is a plain template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.config.bounds import TooMuch, bounded
from peftctl.config.home import expanded
from peftctl.config.near import did_you_mean
from peftctl.config.quote import shown
from peftctl.data.formats import Message
from peftctl.data.sources import near
from peftctl.errors import DataError

if TYPE_CHECKING:
    import jinja2

STOPS = {
    "alpaca": None,
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": None,
    "llama3": "<|eot_id|>",
    "mistral": None,
    "plain": None,
    "zephyr": None,
}
"""Our templates, and the token that closes a turn; None for the tokenizer's `eos_token`."""

SECONDS, MEGABYTES = 1.0, 512
"""What one rendering may take; a template is a program, and may be a stranger's."""
MORE, TIMES = 1 << 20, 16
"""Characters of a rendering from which on it must not be so many times as long as what it renders."""
LARGEST = 1 << 20
"""Characters of a template."""

_PLACE = "dataset.chat_template"
_FOLDER = Path(__file__).parent / "templates"


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of every special token, those included that have no role such as `eos_token`."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def find(chat_template: str, tokenizer: Any, root: Path, say: Callable[[str], None]) -> str:
    """The Jinja text that `dataset.chat_template` means for this tokenizer; files are looked up below `root`.

    Raises DataError when there is none or when it is no Jinja.
    """
    if chat_template == "tokenizer":
        text = _own(tokenizer)
    elif chat_template in STOPS:
        text = _ours(chat_template, tokenizer, say)
    else:
        text = _file(chat_template, root)
    _parse(text)
    if "strftime_now" in text:
        say("the chat template may write today's date into every row: the same data can give other tokens tomorrow")
    return text


def render(
    messages: Sequence[Message],
    tokenizer: Any,
    template: str,
    place: str,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> str:
    """The conversation as the tokenizer writes it, special tokens included. A refusal is a DataError at `place`.

    `tools` are the JSON schemas of the functions that the assistant may call.
    """
    try:
        with bounded(SECONDS, MEGABYTES):
            text: str = tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        if len(text) > MORE and len(text) > TIMES * sum(map(len, written([messages, tools]))):
            raise TooMuch(f"it writes {len(text):,} characters for so few")
    except TooMuch as error:
        text = f"{place}: the chat template does not come to an end with this conversation: {error}"
        raise DataError(text, f"choose another `{_PLACE}`") from None
    except Exception as error:  # a template can raise anything: its own refusals, TypeError, ZeroDivisionError
        what = shown((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        hint = f"change the row, or choose another `{_PLACE}`"
        if messages and messages[0]["role"] == "system" and ("system" in what.lower() or "alternat" in what.lower()):
            hint = f"this template has no system messages: put the text into the first user message, or set `{_PLACE}`"
        elif any(message.get("tool_calls") and not message.get("content") for message in messages):
            hint = f"it may know no calls of tools: set `{_PLACE}` to a template that does"
        raise DataError(f"{place}: the chat template refuses this conversation: {what}", hint) from None
    return text


def _own(tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        hint = f"name one of peftctl's ({', '.join(STOPS)}) or a Jinja file"
        raise DataError(f"{_PLACE}: this tokenizer has no chat template of its own", hint)
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(f"`{name}`" for name in tokenizer.chat_template)
        hint = f"write the one you want into a file and name it as `{_PLACE}`"
        raise DataError(f"{_PLACE}: the tokenizer has several ({names}) and none is its default", hint) from None
    return text


def _ours(name: str, tokenizer: Any, say: Callable[[str], None]) -> str:
    wanted, eos = STOPS[name], tokenizer.eos_token
    known = wanted is not None and wanted in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    if not known and eos is None:
        token = f"neither `{wanted}` nor an end token" if wanted else "no end token"
        raise DataError(f"{_PLACE}: `{name}` needs a token that ends a turn, and the tokenizer has {token}")
    if wanted and not known:
        say(f"`{wanted}` is no token of this tokenizer: `{name}` ends turns with `{eos}` instead")
    stop = f"'{wanted}'" if known else "eos_token"
    first = tokenizer("x", verbose=False)["input_ids"][:1]
    bos = "bos_token" if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else "''"
    body = (_FOLDER / f"{name}.jinja").read_text("utf-8")
    return f"{{%- set bos = {bos} -%}}\n{{%- set stop = {stop} -%}}\n{body}"


def _file(name: str, root: Path) -> str:
    path = root / expanded(name)
    try:
        with path.open("rb") as file:  # no further than it may go: it may be a device that never ends
            return file.read(4 * LARGEST).decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(name, ["tokenizer", *STOPS]) or near(name, root)
        hint = hint or f"`tokenizer`, a Jinja file, or one of {', '.join(STOPS)}"
        raise DataError(f"{_PLACE}: neither one of peftctl's templates nor a file: `{name}`", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{_PLACE}: `{name}` cannot be read: {error}") from None


def literals_read(template: str) -> set[str]:
    """The texts that a template looks for in what it is given, as in `'</think>' in content` or `content.split(...)`.

    Raises DataError when it is no Jinja.
    """
    from jinja2 import nodes

    tree = _parse(template)
    calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr)]
    looked_for = [arg for call in calls for arg in call.args]
    looked_for += [arg for filtered in tree.find_all(nodes.Filter) for arg in filtered.args]
    looked_for += [compared.expr for compared in tree.find_all(nodes.Compare)]
    return {node.value for node in looked_for if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def written(value: Any) -> Iterator[str]:
    """Every text in a structure of mappings and lists, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from written(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from written(inner)


def _parse(text: str) -> jinja2.nodes.Template:
    """Raises DataError when the text is no Jinja, before any row is blamed for it."""
    import jinja2
    from jinja2.ext import loopcontrols

    class Generation(jinja2.ext.Extension):
        """transformers' `{% generation %}` block, as far as parsing goes."""

        tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    if len(text) > LARGEST:
        raise DataError(f"{_PLACE}: a template of {len(text):,} characters, more than {LARGEST:,}")
    try:
        return jinja2.Environment(extensions=[Generation, loopcontrols]).parse(text)
    except RecursionError:
        raise DataError(f"{_PLACE}: not a Jinja template: nested too deep") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{_PLACE}:{error.lineno}: not a Jinja template: {shown(error.message or '', 200)}") from None
    except ValueError:  # the one thing that Jinja's lexer leaves to int()
        raise DataError(f"{_PLACE}: not a Jinja template: a number with too many digits") from None
