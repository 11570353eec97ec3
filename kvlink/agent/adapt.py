"""Recipes that adapt: a step for a quality.

Does not know: contexts, models, how a message is made. Place on the path: beside the sender, before
it packs.
"""

from __future__ import annotations

from dataclasses import replace

from kvlink.codecs import Transform
from kvlink.errors import RecipeError
from kvlink.profile import Profile
from kvlink.recipe import Recipe

INT8_GRADE = -12
"""Code of the step that stands for INT8 where nothing is known of a model: 1/8."""

AUTO_QUALITY = 0.99


def step_for(profile: Profile | None, quality: float) -> int:
    """Code of the largest step that kept a share of `quality` of the calibration's answers.

    INT8_GRADE where no profile says so, or where none of its steps reaches it.
    """
    known = profile.quality if profile else ()
    return max((code for code, agreement in known if agreement >= quality), default=INT8_GRADE)


def with_quality(recipe: Recipe, profile: Profile | None, quality: float) -> Recipe:
    """The recipe with the step for a quality in (0, 1]. Raises RecipeError where it has no step."""
    if not 0 < quality <= 1:
        raise RecipeError(f"quality must be above 0 and at most 1, got {quality:g}")
    codec = transform_of(recipe, "a quality")
    return replace(recipe, codec=replace(codec, step_code=step_for(profile, quality)))


def automatic(profile: Profile | None) -> Recipe:
    """What `auto` stands for: all positions, the transform codec, a step that the model bears."""
    return with_quality(Recipe(codec=Transform(0)), profile, AUTO_QUALITY)


def transform_of(recipe: Recipe, what: str) -> Transform:
    """The recipe's codec where it has a step. Raises RecipeError, saying for what it is needed."""
    if not isinstance(recipe.codec, Transform) or recipe.mode == "text":
        raise RecipeError(f"{what} needs a recipe with a step: auto, or one with transform, got {recipe}")
    return recipe.codec
