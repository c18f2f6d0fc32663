"""The commands: each reads its words, calls its verb and hands over what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import peftctl
from peftctl.cli import console
from peftctl.cli.adapters import adapters
from peftctl.cli.commands import Command, CommandLineError, Group
from peftctl.cli.data import data
from peftctl.cli.evaluate import EXAMPLES, evaluate
from peftctl.cli.init import init
from peftctl.cli.kinds import methods, tasks
from peftctl.cli.plan import BENCH_EXAMPLES, PLAN_EXAMPLES, bench, plan
from peftctl.cli.recipes import recipes
from peftctl.cli.selftest import EXAMPLES as SELFTEST_EXAMPLES
from peftctl.cli.selftest import selftest
from peftctl.cli.words import Changes, Json, Recipe, Target
from peftctl.errors import PeftctlError, Problem

SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Group, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=SETTINGS
)
app.add_typer(recipes, name="recipes")
app.add_typer(adapters, name="adapters")
app.command(cls=Command, epilog="peftctl init --model meta-llama/Llama-3.1-8B-Instruct --data rows.jsonl --task chat")(
    init
)
app.command(
    cls=Command,
    epilog="""
    peftctl data my.yaml
    peftctl data my.yaml dataset.max_length=512 --rows 8 --html rows.html
    peftctl data my.yaml --set eval --json
    """,
)(data)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]


def run(words: Sequence[str]) -> int:
    """Run the command that `words` say and return its exit code. Raises PeftctlError."""
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("peftctl", list(words)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


@app.callback(
    invoke_without_command=True,
    epilog="""
    peftctl recipes
    peftctl train smollm2-lora
    peftctl eval runs/smollm2-lora
    """,
)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network; the same as HF_HUB_OFFLINE=1.")] = False,
) -> None:
    """Fine-tune a language model from one recipe: train, evaluate, merge, export."""
    if version:
        console.out(f"peftctl {peftctl.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.page(context.get_help())
        raise typer.Exit(CommandLineError.exit_code)


app.command(cls=Command, epilog=PLAN_EXAMPLES)(plan)


@app.command(
    cls=Command,
    epilog="""
    peftctl train llama7b-qlora
    peftctl train my.yaml trainer.steps=50 method.r=4 --output runs/try
    peftctl train my.yaml --smoke
    """,
)
def train(
    recipe: Recipe,
    changes: Changes = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Run folder, instead of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that is whole.")] = False,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="Go on only where every bit will be as if never stopped.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen, and write nothing.")] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try every stage on the CPU with a tiny random model; nothing is downloaded."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter. Prints its run folder."""
    from peftctl.cli.live import listening
    from peftctl.recipe import read

    if smoke and (resume or strict_resume or dry_run):
        other = "--dry-run" if dry_run else "--resume" if resume else "--strict-resume"
        raise CommandLineError(f"{other}: does not go with `--smoke`", "a smoke run always does every stage")
    if smoke:
        from peftctl.verbs.smoke import smoke as try_out

        with listening() as listen:
            result = try_out(read(recipe, changes or []), output=output, listen=listen)
        if as_json or output:
            console.hand_over(result, as_json)
        return
    from peftctl.verbs.train import train as verb

    with listening() as listen:
        wanted = read(recipe, changes or [])
        result = verb(wanted, output=output, resume=resume, strict_resume=strict_resume, dry_run=dry_run, listen=listen)
    if as_json or not dry_run:
        console.hand_over(result, as_json)


app.command(cls=Command, epilog=BENCH_EXAMPLES)(bench)
app.command("eval", cls=Command, epilog=EXAMPLES)(evaluate)


@app.command(cls=Command, epilog="peftctl merge runs/llama7b-qlora --output llama7b-merged")
def merge(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or an adapter.")],
    output: Target,
    into: Annotated[
        Literal["base", "dequantised"] | None,
        typer.Option(metavar="base|dequantised", help="Weights to merge into: the base's own, or the quantised ones."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base model, when the adapter does not name the right one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the adapter into the weights of its base, and prove it. Prints the folder of the merged model."""
    from peftctl.cli.live import listening
    from peftctl.verbs.merge import merge as verb

    with listening() as listen:
        result = verb(target, output, into=into, base=base, listen=listen)
    console.hand_over(result, as_json)


@app.command(cls=Command, epilog="peftctl export runs/llama7b-qlora --format peft --output llama7b-adapter")
def export(
    target: Run,
    format: Annotated[
        Literal["peft", "safetensors"],
        typer.Option(metavar="peft|safetensors", help="An adapter folder, or a whole model for plain transformers."),
    ],
    output: Target,
    as_json: Json = False,
) -> None:
    """Write what other programs load: an adapter, or a merged model. Prints its folder."""
    from peftctl.cli.live import listening
    from peftctl.verbs.export import export as verb

    with listening() as listen:
        result = verb(target, output, format=format, listen=listen)
    console.hand_over(result, as_json)


@app.command(
    cls=Command,
    epilog="""
    peftctl generate runs/llama7b-qlora "What is a llama?"
    peftctl generate runs/llama7b-qlora "What is a llama?" --sample --seed 1
    """,
)
def generate(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or an adapter.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to answer, or to go on from.")],
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens, instead of the most probable ones.")] = False,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.01, help="With --sample: lower is bolder.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(metavar="P", min=0.01, max=1, help="With --sample: share of probability to draw from.")
    ] = 0.9,
    beams: Annotated[int, typer.Option(metavar="N", min=1, help="Answers to search side by side.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 128,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="With --sample, and of pictures: seed.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="PNG", help="The picture, of a model that draws.")] = None,
) -> None:
    """Print what the tuned model says, or draw what it is told."""
    from peftctl.cli.live import listening
    from peftctl.verbs.generate import generate as verb

    with listening() as listen:
        said = verb(
            target,
            text,
            base=base,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            beams=beams,
            max_new_tokens=max_new_tokens,
            seed=seed,
            output=output,
            listen=listen,
        )
    console.out(said)


@app.command(cls=Command, epilog="peftctl validate recipes/*.yaml")
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE ...", help="Recipe files, or names of bundled ones.")],
    as_json: Json = False,
) -> None:
    """Check recipes without running them. Every mistake is told with its place."""
    from peftctl.recipe import read

    changes = [word for word in recipes if "=" in word and not os.path.exists(word)]
    found: dict[str, Sequence[Problem]] = {}
    for name in [word for word in recipes if word not in changes] or recipes:
        try:
            read(name, changes)
            found[name] = ()
        except PeftctlError as error:
            found[name] = error.problems
            console.complain(error.problems)
        if not as_json and not found[name]:
            console.out(f"{name}: ok")
    mistakes = [each._asdict() for problems in found.values() for each in problems]
    if as_json:
        checked = [{"recipe": name, "ok": not problems} for name, problems in found.items()]
        console.out_json({"recipes": checked, **({"error": mistakes} if mistakes else {})})
    raise typer.Exit(PeftctlError.exit_code if mistakes else 0)


@app.command(cls=Command, epilog="peftctl schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from peftctl.recipe import schema as whole

    console.out_json(whole())


app.command(cls=Command, epilog=SELFTEST_EXAMPLES)(selftest)
app.command(cls=Command, epilog="peftctl methods lora")(methods)
app.command(cls=Command, epilog="peftctl tasks dpo")(tasks)
