"""Recipes that adapt: `auto`, and what a message should be like beyond its recipe.

    quality   the coarsest step of a transform that kept this share of answers when the profile was made
    bits      the finest step whose transfer has at most so many bits an element; where a step that leaves
              all positions whole does not reach that, positions are chosen for the question
    budget    fewer positions, until the transfer has at most so many bytes
    deadline  positions in order of importance, so that what has come by then can be answered from
    verify    finer until the sender reads its own answer from the message

Each alone and all together; what cannot be met is refused with the least that can. Without a profile `auto`
is int8, and a transform only where bits or a quality ask for one: how much of a step a model bears is not known.

Does not know: how a message is made. Place on the path: the sender's choice before and after it packs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvlink.agent.uses import require_usable
from kvlink.codecs import STEP_CODES, Transform
from kvlink.errors import DeadlineError, LimitError, RecipeError
from kvlink.profile import Profile
from kvlink.recipe import PLAIN_RECIPE, Recipe, Target
from kvlink.selection import Amount, Selection

if TYPE_CHECKING:
    from kvlink.agent.context import Context, Look
    from kvlink.agent.plan import Delivered
    from kvlink.agent.sender import Sender
    from kvlink.agent.transfer import OnProgress, Transfer


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at`: by `time.perf_counter`. `order`: the selection whose scores order the positions."""

    at: float
    order: Selection

    @property
    def left_ms(self) -> int:
        """What is left of it. Raises DeadlineError where nothing is."""
        left_s = self.at - time.perf_counter()
        if left_s <= 0:
            raise DeadlineError(f"the deadline passed {-left_s:.2g} s before the first frame could leave")
        return math.ceil(1e3 * left_s)


INT8_GRADE = -12
"""Code of the step that stands for INT8 where nothing is known of a model: 1/8."""

AUTO_QUALITY = 0.99
_COARSEST_WHOLE, _CHOSEN_STEP = 2, 0
"""Codes of steps: all positions in one coarser than 1.41 keep less than a choice of them in a step of 1."""
_ESCALATIONS = 8


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
    return with_step(recipe, transform_of(recipe, "a quality"), step_for(profile, quality))


def automatic(profile: Profile | None, target: Target | None = None) -> Recipe:
    """What `auto` stands for: all positions, and a step that the model is known to bear.

    Without a profile int8, unless the target is one that only a step can meet.
    """
    if profile is None and not (target and target.needs_step):
        return Recipe.parse(PLAIN_RECIPE)
    return with_quality(Recipe(codec=Transform(0)), profile, AUTO_QUALITY)


def transform_of(recipe: Recipe, what: str) -> Transform:
    """The recipe's codec where it has a step. Raises RecipeError, saying for what it is needed."""
    if not isinstance(recipe.codec, Transform) or recipe.mode == "text":
        raise RecipeError(f"{what} needs a recipe with a step: auto, or one with transform, got {recipe}")
    return recipe.codec


def with_step(recipe: Recipe, codec: Transform, step_code: int) -> Recipe:
    """The recipe with another step; a rest is never finer than it."""
    rest = recipe.background
    if isinstance(rest, Transform):
        rest = replace(rest, step_code=max(rest.step_code, step_code))
    return replace(recipe, codec=replace(codec, step_code=step_code), background=rest)


class Packing:
    """One context for one question within one target. `run` packs as often as that takes.

    Raises RecipeError, ContextError, LimitError.
    """

    def __init__(
        self,
        sender: Sender,
        context: Context,
        question: str,
        target: Target,
        transfer_id: bytes,
        look: Look | None = None,
        base: Delivered | None = None,
        progress: OnProgress | None = None,
    ) -> None:
        """`look`: what was seen for the recipe's selection already. `base`: what is added to. `progress`: told what is
        coded."""
        self._sender, self._context, self._question = sender, context, question
        self._target, self._transfer_id = target, transfer_id
        self._look, self._looked_for = look, ""
        self._base, self._progress = base, progress
        self._deadline_at = time.perf_counter() + target.deadline_s if target.deadline_s else 0.0

    def run(self, recipe: Recipe) -> Transfer:
        target, self._looked_for = self._target, recipe.selection.name if self._look else ""
        if target.quality:
            recipe = with_quality(recipe, self._sender.lm.profile, target.quality)
        if target.max_bits:
            transfer = self._within_bits(recipe)
        elif target.budget_bytes and recipe.selection.method != "all":
            transfer = self._choose(recipe, target.budget_bytes)
        else:
            transfer = self._pack(recipe)
        if target.budget_bytes and transfer.receipt.wire_bytes > target.budget_bytes:
            transfer = self._choose(transfer.manifest.recipe, target.budget_bytes)
        return self._verified(transfer) if target.verify and recipe.mode == "kv" else transfer

    def _pack(self, recipe: Recipe) -> Transfer:
        """One recipe as it is; evidence is captured once for all steps and amounts of a selection."""
        require_usable(self._sender.lm, recipe)
        deadline = self._deadline(recipe)
        looked = deadline.order if deadline else recipe.selection
        name = looked.name
        if self._look is None or (name not in ("all", self._looked_for)):
            self._look = self._sender.look(self._context, self._question, looked)
            self._looked_for = name
        return self._sender.pack_once(
            self._context, self._transfer_id, recipe, self._look, self._base, self._progress, deadline
        )

    def _deadline(self, recipe: Recipe) -> Deadline | None:
        """When what has come is enough, and by what its order is found: the question where the recipe sends all."""
        if not self._deadline_at or recipe.mode == "text":
            return None
        order = recipe.selection
        if order.method == "all":
            order = Selection("q2c" if self._question.strip() else "streaming")
        return Deadline(self._deadline_at, order)

    def _choose(self, recipe: Recipe, budget_bytes: int) -> Transfer:
        """As many positions as the budget holds; by the question where the recipe chooses none."""
        if recipe.mode == "text" or (recipe.selection.method == "all" and not self._question.strip()):
            least = self._pack(recipe).receipt.wire_bytes
            ways = "" if recipe.mode == "text" else "; with a question, positions can be chosen for it"
            what = "the text" if recipe.mode == "text" else f"the whole cache as {recipe}"
            raise LimitError(f"{what} takes {least} bytes, more than the budget of {budget_bytes}{ways}")
        if recipe.selection.method == "all":
            recipe = replace(recipe, selection=Selection("q2c+draft"))
        return self._pack(recipe.with_amount(Amount(budget_bytes, "bytes")))

    def _within_bits(self, recipe: Recipe) -> Transfer:
        """The finest step of all whose transfer has at most so many bits an element."""
        codec, most, target = transform_of(recipe, "a number of bits"), self._target.max_bits, self._target
        may_choose = recipe.selection.method == "all" and bool(self._question.strip()) and not target.quality
        coarsest = codec.step_code if target.quality else _COARSEST_WHOLE if may_choose else STEP_CODES[1]
        found = self._finest(recipe, codec, coarsest)
        if found is None and may_choose:
            budget_bytes = max(1, int(most * self._context.cache.shape.element_count / 8))
            try:
                return self._choose(with_step(recipe, codec, _CHOSEN_STEP), budget_bytes)
            except LimitError as error:
                raise LimitError(
                    f"at most {most:g} bits an element are {budget_bytes} bytes: {error}"
                ) from None
        if found is None:
            least = self._pack(with_step(recipe, codec, coarsest)).receipt.bits_per_element
            what = f"a quality of {target.quality:g}" if target.quality else f"the coarsest step of {recipe}"
            ways = (
                "ask for less of it"
                if target.quality
                else "choose fewer positions, such as q2c+draft@0.1 transform=1"
            )
            raise LimitError(
                f"{what} takes {least:.3g} bits an element, more than the {most:g} asked for; {ways}"
            )
        return found

    def _finest(self, recipe: Recipe, codec: Transform, coarsest: int) -> Transfer | None:
        best, low, high = None, STEP_CODES[0], coarsest
        while low <= high:
            middle = (low + high) // 2
            found = self._pack(with_step(recipe, codec, middle))
            if found.receipt.bits_per_element <= self._target.max_bits:
                best, high = found, middle - 1
            else:
                low = middle + 1
        return best

    def _verified(self, transfer: Transfer) -> Transfer:
        """The transfer with its certificate; a finer one where it does not pass."""
        began, sender = time.perf_counter(), self._sender
        draft = (self._look.draft if self._look else None) or sender.draft(self._context, self._question)
        for escalations in range(_ESCALATIONS + 1):
            transfer.draft = draft
            found = sender.certify(self._context, self._question, transfer, escalations)
            next_recipe = transfer.manifest.recipe.finer()
            if found.passed or next_recipe is None or escalations == _ESCALATIONS:
                break
            # A finer recipe looks at the same evidence, or at none.
            transfer = self._pack(next_recipe)
        self._require_met(transfer)
        told = replace(found, seconds=time.perf_counter() - began)
        transfer.note({"verify": told.seconds}, told)
        return transfer

    def _require_met(self, transfer: Transfer) -> None:
        """What was made finer must still be as small as was asked. Raises LimitError."""
        target, got = self._target, transfer.receipt
        asked = []
        if target.max_bits and got.bits_per_element > target.max_bits:
            asked.append(f"{target.max_bits:g} bits an element")
        if target.budget_bytes and got.wire_bytes > target.budget_bytes:
            asked.append(f"{target.budget_bytes} bytes")
        if asked:
            raise LimitError(
                f"no message of at most {' and '.join(asked)} passes the check: the first that does has "
                f"{got.wire_bytes} bytes, {got.bits_per_element:.3g} bits an element"
            )
