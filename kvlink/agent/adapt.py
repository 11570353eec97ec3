"""Recipes that adapt: a step for a quality, the finest that fits, a finer one when a check fails.

Does not know: contexts, models, how a message is made. Place on the path: beside the sender, before
it packs and after it has checked.
"""

from __future__ import annotations

from dataclasses import replace

from kvlink.errors import RecipeError
from kvlink.profile import Profile
from kvlink.recipe import Quantizer, Recipe, Selection

AUTO = "auto"
INT8_GRADE = -12
"""Code of the step that stands for INT8 where nothing is known of a model: 1/8."""

AUTO_QUALITY = 0.99
_FINER_CODES = 4
_FINEST_CODE = -16
_MORE_BITS = {1: 2, 2: 3, 3: 4, 4: 8, 8: 16}


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
    require_transform(recipe, "a quality")
    return replace(recipe, transform=step_for(profile, quality))


def automatic(profile: Profile | None) -> Recipe:
    """What `auto` stands for: all positions, the transform codec, a step that the model bears."""
    return with_quality(Recipe(transform=0), profile, AUTO_QUALITY)


def require_transform(recipe: Recipe, what: str) -> None:
    if recipe.transform is None:
        raise RecipeError(f"{what} needs a recipe with a step: auto, or one with transform, got {recipe}")


def finer(recipe: Recipe) -> Recipe | None:
    """The next finer recipe; raw, then all positions, come last; None after them."""
    if recipe.transform is not None:
        if recipe.transform > _FINEST_CODE:
            step = max(_FINEST_CODE, recipe.transform - _FINER_CODES)
            rest = None if recipe.rest is None else max(step, recipe.rest - _FINER_CODES)
            return replace(recipe, transform=step, rest=rest)
        chosen = recipe.selection if recipe.rest is None else Selection()
        return replace(recipe, transform=None, basis="auto", rest=None, selection=chosen)
    coarse = [q.bits for q in (recipe.keys, recipe.values) if q.bits < 16]
    if coarse or recipe.rank:
        finest = [_finer_quantizer(q) for q in (recipe.keys, recipe.values)]
        return replace(recipe, keys=finest[0], values=finest[1], rank=0, overrides=())
    if recipe.selection.method != "all":
        return replace(recipe, selection=Selection())
    return None


def _finer_quantizer(quantizer: Quantizer) -> Quantizer:
    bits = _MORE_BITS.get(quantizer.bits, 16)
    return Quantizer() if bits == 16 else replace(quantizer, bits=bits)
