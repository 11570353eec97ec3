"""What a recipe asks of a model, compared with what the model's self-test passed: before anything is read.

Does not know: how the test was made. Place on the path: in front of prefill and of a transfer's first segment.
"""

from __future__ import annotations

from kvlink.codecs import Transform
from kvlink.compress.select import needs
from kvlink.errors import RecipeError
from kvlink.model.language import LanguageModel
from kvlink.model.traits import Use
from kvlink.recipe import PLAIN_RECIPE, Recipe


def uses(recipe: Recipe) -> list[Use]:
    """What a recipe asks of a model beyond a whole cache."""
    if recipe.mode == "text":
        return []
    selection = recipe.selection
    found: list[Use] = []
    if recipe.prunes:
        found.append("selection")
    if selection.method != "all":
        if selection.scope == "head":
            found.append("scope=head")
        if selection.when == "during":
            found.append("when=during")
        if needs(selection.method) - {"press"}:
            found.append("attention")
    if isinstance(recipe.codec, Transform):
        found.append("transform")
    return found


def require_usable(lm: LanguageModel, recipe: Recipe) -> None:
    """Raise RecipeError where the model cannot serve the recipe, with the model's trait and a recipe that works."""
    for use in uses(recipe):
        if why := lm.traits.refused.get(use):
            raise RecipeError(f"{recipe} cannot be used with {lm.name}: {why}; use {PLAIN_RECIPE}")
