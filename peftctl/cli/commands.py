"""Typer's commands with our help and our errors: short, plain, and the same in every version of Typer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from peftctl.cli import console
from peftctl.errors import PeftctlError, Problem

WIDEST = 90
"""Columns of a help page on a wide terminal."""


class CommandLineError(PeftctlError):
    """A command line that cannot be understood; nothing was done."""

    exit_code = 2


TyperUsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a wrong command line; it has no public name."""


class Spoken:
    """What commands and groups have in common."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The page that `--help` shows."""
        formatter.write(page(self, ctx))

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, with its page on our standard output."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.help, option.callback = "Show this page.", _show_page
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """The words as arguments and options. Raises CommandLineError where they are none."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        except TyperUsageError as error:
            raise CommandLineError.of([problem(error, ctx)]) from None


class Command(Spoken, TyperCommand):
    """One command. Its epilog holds examples, one a line."""


class Group(Spoken, TyperGroup):
    """A command with commands below it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is meant. Raises CommandLineError for one that does not exist, with the nearest name."""
        if self.get_command(ctx, args[0]) is None:
            hint = near(args[0], self.list_commands(ctx)) or f"`{ctx.command_path} --help` lists the commands"
            raise CommandLineError(f"`{args[0]}`: no such command", hint)
        return super().resolve_command(ctx, args)


def page(command: Any, context: Any) -> str:
    """Usage, what the command does, what it takes, examples."""
    columns = min(typer.get_terminal_size().columns, WIDEST)
    shown = [param for param in command.get_params(context) if not getattr(param, "hidden", False)]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    options = [param for param in shown if param.param_type_name == "option"]
    words = [_usage(param) for param in arguments] + [_spelled(param) for param in options if param.required]
    words += ["COMMAND"] * isinstance(command, Group) + ["[options]"]
    blocks = [
        textwrap.fill(f"usage: {context.command_path} {' '.join(words)}", columns, subsequent_indent=" " * 7),
        textwrap.fill(" ".join((command.help or "").split()), columns),
    ]
    if isinstance(command, Group):
        names = command.list_commands(context)
        below = [(name, _summary(command.get_command(context, name))) for name in names]
        blocks.append(_listed("commands", below, columns))
    blocks.append(_listed("arguments", [(_spelled(param), param.help or "") for param in arguments], columns))
    blocks.append(_listed("options", [(_spelled(param), _told(param)) for param in options], columns))
    if command.epilog:
        blocks.append("examples:\n" + textwrap.indent(textwrap.dedent(command.epilog).strip(), "  "))
    return "\n\n".join(block for block in blocks if block) + "\n"


def problem(error: Any, context: Any) -> Problem:
    """What Typer found wrong with a command line, in our words."""
    hint = f"`{context.command_path} --help` shows what it takes"
    if wrong := getattr(error, "option_name", None):
        known = [name for param in context.command.get_params(context) for name in param.opts]
        if wrong not in known:
            return Problem(f"`{wrong}`: no such option", near(wrong, known) or hint)
    param, said = getattr(error, "param", None), _sentence(error.message)
    if param is None:
        return Problem(said, hint)
    if type(error).__name__ == "MissingParameter":
        return Problem(f"`{_spelled(param)}` is missing", hint)
    return Problem(f"`{param.opts[-1] if param.param_type_name == 'option' else param.metavar}`: {said}", hint)


def near(word: str, known: Iterable[str]) -> str | None:
    """A hint at the name that was meant."""
    from peftctl.config.near import did_you_mean

    return did_you_mean(word, known)


def _show_page(context: Any, _param: Any, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        console.out(context.get_help())
        raise typer.Exit


def _usage(param: Any) -> str:
    return str(param.metavar if param.required else f"[{param.metavar}]")


def _spelled(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar)
    names = ", ".join(sorted(param.opts, key=len))
    return f"{names} {param.metavar}" if param.metavar else names


def _told(param: Any) -> str:
    shown = param.default is not None and not isinstance(param.default, bool) and not callable(param.default)
    return f"{param.help} (default {param.default})" if shown else str(param.help)


def _summary(command: Any) -> str:
    """The first sentence of what a command does."""
    return " ".join((command.help or "").split()).partition(". ")[0].rstrip(".")


def _listed(title: str, rows: list[tuple[str, str]], columns: int) -> str:
    if not rows:
        return ""
    indent = max(len(name) for name, _ in rows) + 4
    lines = [f"{title}:"]
    for name, text in rows:
        wide = columns - indent >= 24
        wrapped = textwrap.wrap(text, columns - indent if wide else columns - 6)
        if not wide:
            lines += [f"  {name}", *(f"      {line}" for line in wrapped)]
        else:
            lines += [f"  {name}".ljust(indent) + (wrapped or [""])[0], *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    text = " ".join(text.removeprefix("Value error, ").split()).rstrip(".")
    return re.sub(r"'([^']*)'", r"`\1`", text[:1].lower() + text[1:])
