"""What a model card tells about a run."""

from __future__ import annotations

from peftctl import recipe as recipes
from peftctl.engine.peft_config import PEFT_TYPES
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.exports.card import Facts
from peftctl.models.adapted import by_folder
from peftctl.models.head import Head
from peftctl.recipe import Recipe
from peftctl.verbs import provenance
from peftctl.verbs.run_folder import RunFolder


def facts_of(recipe: Recipe, base: str, counts: dict[str, dict[str, int]], head: Head) -> Facts:
    """The facts of a run that is under way; `head` is what it trains."""
    text, peft = recipes.dump(recipe), recipe.method.peft_type in PEFT_TYPES
    return Facts(base=base, method=in_words(recipe), recipe=text, counts=counts, head=head, peft=peft)


def facts_of_run(folder: RunFolder, merged: bool) -> Facts:
    """The facts of a finished run, out of its folder; with what `peftctl eval` measured."""
    recipe, record = recipes.read_run(folder.path), folder.read_provenance()
    return Facts(
        base=record.get("base", {}).get("name", recipe.model.name_or_path),
        method=in_words(recipe),
        recipe=recipes.dump(recipe),
        counts=record.get("rows", {}),
        figures=figures_of(folder),
        head=recipe.trainer.task.of(by_folder(folder.adapter)).head,
        merged=merged,
        peft=recipe.method.peft_type in PEFT_TYPES,
    )


def figures_of(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What `peftctl eval` measured last; nothing when that was another adapter than the run's own."""
    measured = folder.read_json(folder.evaluation)
    mine = measured and measured.get("adapter_sha256") == provenance.file_digest(folder.adapter / WEIGHTS)
    return dict(measured.get("figures", {})) if mine else {}


def in_words(recipe: Recipe) -> str:
    """The method in one line, such as `lora, r 16, alpha 32, on all-linear`."""
    method = recipe.method
    named = [f"{key} {getattr(method, key):g}" for key in ("r", "alpha") if getattr(method, key, None) is not None]
    targets = getattr(method, "target_modules", None)
    if targets:
        named.append("on " + (targets if isinstance(targets, str) else ", ".join(targets)))
    if recipe.model.quantization != "none":
        named.append(f"base in {recipe.model.quantization}")
    return ", ".join([f"`{recipes.method_name(method)}`", *named])
