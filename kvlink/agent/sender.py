"""The sender: reads a context once, and packs what a question needs of it.

`Sender.pack` is the sender's whole path:

    look (draft, evidence) → select → a transfer that encodes and frames as it is read

Does not know: sockets (the service does). Place on the path: its first half.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlink.agent.adapt import Deadline, Packing, automatic
from kvlink.agent.builder import restored
from kvlink.agent.context import Context, Cut, Look, evidence_key
from kvlink.agent.plan import Delivered, delivered, plan, plan_missing
from kvlink.agent.transfer import OnProgress, Outline, Transfer, outlined, outlined_text, reported
from kvlink.agent.uses import require_usable
from kvlink.cache import Evidence, KVCache
from kvlink.codecs import AUTO_CALIBRATION, NO_CALIBRATION, Codec, Transform
from kvlink.compress.codec import SegmentPlan
from kvlink.compress.codecs import CodecContext
from kvlink.compress.lossless import pack_part
from kvlink.compress.select import choose_positions, in_tiers, kept_count, needs, score
from kvlink.errors import CodecError, ContextError, LimitError, ModelError, RecipeError
from kvlink.model.adopt import cache_of, ids_of, prompt_of
from kvlink.model.calibrate import rotation, units
from kvlink.model.exchange import GenerateInputs, generate_inputs
from kvlink.model.generate import Answer, answer, divergence, logits_along
from kvlink.model.loading import EMBEDDED, LanguageModel, language_model
from kvlink.model.prefill import prefill, prefill_more, read_context, read_press, read_question
from kvlink.model.restore import cache_shape
from kvlink.payload import TurnLike, turns_from
from kvlink.receipt import Certificate, Receipt
from kvlink.recipe import AUTO, DEFAULT_RECIPE, Recipe, Target
from kvlink.selection import Amount, Selection
from kvlink.transport.api import Explanation
from kvlink.transport.link import AddedBytes, added_by_nothing
from kvlink.wire.layout import kept_share, kept_tokens
from kvlink.wire.messages import TRANSFER_ID_BYTES, Manifest
from kvlink.wire.session import CHUNK_BYTES, read_transfer

DRAFT_TOKENS = 24
_FIT_ROUNDS = 6
_COUNTED = ("ratio", "count")


class Sender:
    """Reads contexts with a model and packs what questions need of them."""

    def __init__(
        self, model: Any = EMBEDDED, tokenizer: Any = None, *, chunk_bytes: int = CHUNK_BYTES,
        added_bytes: AddedBytes = added_by_nothing, **options: str,
    ) -> None:  # fmt: skip
        """`model`, `tokenizer`, `options`: see `model.loading.language_model`. `chunk_bytes`: most bytes of a chunk.
        `added_bytes`: of the link that transfers will take, for receipts and budgets."""
        self.lm = language_model(model, tokenizer, **options)
        self.chunk_bytes, self.added_bytes = chunk_bytes, added_bytes
        self._units: tuple[tuple[Tensor, Tensor], ...] = ()

    def read(self, text: str, turns: Iterable[TurnLike] = (), progress: OnProgress | None = None) -> Context:
        """Prefill `text`. Raises ContextError where it is empty or larger than the window."""
        return self.prefill(self.cut(text, turns), progress)

    def cut(self, text: str, turns: Iterable[TurnLike] = ()) -> Cut:
        """A text in tokens. Raises ContextError where it is empty or larger than the window."""
        turns = turns_from(turns)
        self.lm.require_room("the context", text, *(turn.content for turn in turns))
        prompt = self.lm.template.prompt(turns)
        ids = self.lm.context_ids(text, prompt)
        return Cut(text, prompt, ids, cache_shape(self.lm, len(ids)).cache_bytes)

    def prefill(self, cut: Cut, progress: OnProgress | None = None) -> Context:
        """Read a text that was cut."""
        began = time.perf_counter()
        cache = prefill(
            self.lm, cut.ids, on_layer=partial(progress, "read") if progress is not None else None
        )
        _require_finite(cache)
        return Context(cut.text, cut.ids, cut.prompt, cache, time.perf_counter() - began)

    def adopt(self, past_key_values: Any, token_ids: Any, turns: Iterable[TurnLike] = ()) -> Context:
        """A context that transformers code has read with this model: its filled `DynamicCache` and its token ids.

        Where the ids are what the template writes around a text, after `turns`, it is the context that `read` gives;
        else nothing stands around it, and a question continues it. The tensors are shared, not copied.
        Raises UnsupportedCacheError, ContextError: see `model.adopt`.
        """
        ids = ids_of(self.lm, token_ids)
        cache = cache_of(self.lm, past_key_values, ids)
        text, prompt = prompt_of(self.lm, ids, turns_from(turns))
        return Context(text, ids, prompt, cache, 0.0)

    def extend(self, context: Context, more: str) -> Context:
        """The context with `more` text behind, which alone is read; `context` stays as it is.

        What a receiver holds of `context` is a base for transfers of the longer one. Raises ContextError.
        """
        return self.read_on(context, self.continued(context, more))

    def continued(self, context: Context, more: str) -> Cut:
        """The context with `more` text behind, in tokens, which begin with the context's. Raises ContextError."""
        lm = self._asking(context)
        text, ids = lm.continued_ids(context.ids, context.text, more, context.prompt)
        return Cut(text, context.prompt, ids, cache_shape(self.lm, len(ids)).cache_bytes)

    def read_on(self, context: Context, cut: Cut) -> Context:
        """Read the tokens of `cut` behind those of `context`."""
        began = time.perf_counter()
        cache = prefill_more(self.lm, context.cache, cut.ids[len(context.ids) :])
        _require_finite(cache)
        with context.lock:
            left = dict(context.delivered)
        return Context(cut.text, cut.ids, cut.prompt, cache, time.perf_counter() - began, delivered=left)

    def answer(self, context: Context, question: str, **options: float) -> Answer:
        """What the sender itself answers, from its full cache."""
        return answer(self._asking(context), context.cache, question, **options)

    def generate_inputs(self, context: Context, question: str, beams: int = 1) -> GenerateInputs:
        """What `sender.lm.model.generate(**inputs)` needs to answer from the full cache."""
        return generate_inputs(self._asking(context), context.cache, question, beams)

    def look(self, context: Context, question: str, selection: Selection) -> Look:
        """Capture what `selection` looks at. Raises ContextError where the question is missing.

        Serves every selection of the same `evidence_key`.
        """
        needed, clock = needs(selection.method), _Clock()
        if needed & {"question", "asked_window"} and not question.strip():
            raise ContextError(f"selection {selection.method} needs the question, which is empty")
        draft = self.draft(context, question) if "draft" in needed else None
        clock.lap("draft")
        if "question" in needed:
            ids = self._asking(context).question_ids(question, context.cache.tokens)
            evidence = read_question(self.lm, context.cache, ids, draft.token_ids if draft else ())
        elif "asked_window" in needed:
            ids = self._asking(context).question_ids(question, context.cache.tokens)
            evidence = read_context(self.lm, context.ids, needed, selection.window, ids)
        else:
            evidence = self._of_context(context, selection) if needed else Evidence()
        clock.lap("select")
        return Look(evidence, draft, clock.stage_s)

    def explain(
        self, context: Context, question: str, transfer: Transfer, receipt: Receipt | None = None
    ) -> Explanation:
        """What `transfer` chose of the context, token by token, beside what the question needs. `receipt`: of what
        was there when it was enough, where that is less than all.

        Captures evidence once more. Raises ContextError where the question is missing.
        """
        shape, receipt = context.cache.shape, receipt or transfer.receipt
        voting = Selection("q2c+draft", pool=1)
        look = self.look(context, question, voting)
        need = score(look.evidence, voting, shape)[0]
        kept = torch.ones(shape.tokens)
        recipe = transfer.manifest.recipe
        chosen = recipe.selection if recipe.selection.method != "all" else Selection("q2c")
        if recipe.prunes or receipt.kept_share < 1:
            # The amount as it came out: a budget or a share of mass is a count by now.
            counted = replace(chosen, amount=Amount(receipt.kept_tokens, "count"))
            same = chosen.method == voting.method
            evidence = look.evidence if same else self.look(context, question, chosen).evidence
            sets = choose_positions(evidence, counted, shape).reshape(-1, receipt.kept_tokens)
            kept = torch.zeros(len(sets), shape.tokens).scatter_(1, sets, 1.0).mean(0)
        pieces = self._asking(context).context_pieces(context.text, context.prompt, context.ids)
        return Explanation(
            tuple(pieces),
            tuple((need / need.sum().clamp(min=1e-20)).tolist()),
            tuple(kept.tolist()),
        )

    def pack(
        self,
        context: Context,
        question: str,
        recipe: Recipe | str = DEFAULT_RECIPE,
        target: Target | None = None,
        look: Look | None = None,
        transfer_id: bytes = b"",
        base: bytes = b"",
        progress: OnProgress | None = None,
    ) -> Transfer:
        """Reduce the context for `question` and frame it. `recipe`: `auto` too.

        `target`: what the message should be like, see `agent.adapt`.
        `look`: what `look` gave for this question and method, where several recipes share it.
        `transfer_id`: 16 bytes; random where none are given.
        `base`: the `cache_digest` of an earlier transfer of this context, or of one that it extends: only what is
        missing there travels. Where it is not known, where the recipe cannot add to it, and with `verify`, all does.
        `progress`: told of what is coded, when it is: as frames are read, or once more for each size that is tried.
        Raises RecipeError, ContextError, LimitError (nothing meets the target; it says what the least is).
        """
        target, name = target or Target(), transfer_id or secrets.token_bytes(TRANSFER_ID_BYTES)
        recipe = self.recipe(recipe, target) if isinstance(recipe, str) else recipe
        known = None if target.verify else context.delivered.get(base)
        return Packing(self, context, question, target, name, look, known, progress).run(recipe)

    def recipe(self, text: str, target: Target | None = None) -> Recipe:
        """The recipe that a text stands for, `auto` included. Raises RecipeError, where the model cannot
        serve it too."""
        profile = None if "transform" in self.lm.traits.refused else self.lm.profile
        found = automatic(profile, target or Target()) if text == AUTO else Recipe.parse(text)
        require_usable(self.lm, found)
        return found

    def pack_once(
        self,
        context: Context,
        transfer_id: bytes,
        recipe: Recipe,
        look: Look,
        base: Delivered | None = None,
        progress: OnProgress | None = None,
        deadline: Deadline | None = None,
    ) -> Transfer:
        """One recipe as it is, with what was looked at. Raises LimitError where its budget is too small,
        DeadlineError where nothing could leave in time."""
        recipe = self.resolved(recipe)
        clock = _Clock(look.stage_s, transfer_id, progress, deadline)
        base = base if base is not None and base.serves(recipe) else None
        if recipe.mode == "text":
            if not context.text:
                raise RecipeError("the context has no text that is cut into its token ids: send its cache")
            part = pack_part("text", context.text.encode(), recipe.coder)
            clock.lap("encode")
            return self._framed(context, recipe, [outlined_text(part)], clock)
        if recipe.selection.amount.unit == "bytes":
            return self._fit(context, recipe, look, clock, base)
        return self._planned(context, recipe, look, clock, base)

    def certify(
        self, context: Context, question: str, transfer: Transfer, escalations: int = 0
    ) -> Certificate:
        """Decode `transfer`, and read the sender's own answer from both caches.

        Raises ContextError where the question is empty.
        """
        began = time.perf_counter()
        draft = transfer.draft or self.draft(context, question)
        _, segments = read_transfer(transfer.frames)
        shape = transfer.manifest.shape
        cache = restored(segments, shape, lambda codec: self._codec_context(codec, context))
        own, found = (
            logits_along(self._asking(context), held, question, draft) for held in (context.cache, cache)
        )
        nats = divergence(own.log_softmax(-1), found.log_softmax(-1))
        return Certificate(
            agreeing_tokens=int((own.argmax(-1) == found.argmax(-1)).sum()),
            tokens=len(draft.token_ids),
            kl_mean=float(nats.mean()),
            logit_error=float((own - found).abs().max()),
            escalations=escalations,
            seconds=time.perf_counter() - began,
        )

    def draft(self, context: Context, question: str) -> Answer:
        """The sender's own answer, briefly."""
        return answer(self._asking(context), context.cache, question, max_new_tokens=DRAFT_TOKENS)

    def _asking(self, context: Context) -> LanguageModel:
        """The model, with the template by which a question goes on from a context."""
        return self.lm.asking(context.prompt.template_id)

    def resolved(self, recipe: Recipe) -> Recipe:
        """A transform's basis by name: the model's profile where there is one."""
        codec, profile = recipe.codec, self.lm.profile
        if not isinstance(codec, Transform) or codec.basis != AUTO_CALIBRATION:
            return recipe
        named = replace(codec, basis=profile.digest.hex() if profile else NO_CALIBRATION)
        rest = recipe.background
        if isinstance(rest, Transform):
            rest = replace(rest, basis=named.basis)
        return replace(recipe, codec=named, background=rest)

    def _codec_context(self, codec: Codec, context: Context) -> CodecContext:
        """What a codec needs to know of the model."""
        if not isinstance(codec, Transform):
            return CodecContext()
        if codec.calibration is None and not self._units:
            self._units = units(self.lm)
        return CodecContext(rotation(self.lm, context.cache.tokens), self.lm.profile, self._units)

    def _of_context(self, context: Context, selection: Selection) -> Evidence:
        """Evidence that serves every question over the context; captured once."""
        method, key, tokens = selection.method, evidence_key(selection), context.cache.tokens
        with context.lock:
            if key not in context.evidence:
                if selection.press:
                    share = (
                        kept_count(selection, tokens) / tokens if selection.amount.unit in _COUNTED else 1.0
                    )
                    found = read_press(self.lm, context.ids, selection.press, 1 - share)
                else:
                    found = read_context(self.lm, context.ids, needs(method), selection.window)
                context.evidence[key] = found
            return context.evidence[key]

    def _planned(
        self, context: Context, recipe: Recipe, look: Look, clock: _Clock, base: Delivered | None
    ) -> Transfer:
        """Choose the positions, and plan the segments that bring them, or what is missing of them."""
        selection, cache = recipe.selection, context.cache
        positions, scores = None, None
        if selection.method != "all":
            positions = choose_positions(look.evidence, selection, cache.shape)
        if base is not None:
            scores = None if positions is None else score(look.evidence, selection, cache.shape)
            plans = plan_missing(cache, recipe, positions, scores, base)
        elif selection.when == "during":
            plans = [SegmentPlan.of(prefill(self.lm, context.ids, positions), recipe.codec)]
        else:
            tiers = []
            if clock.deadline:
                kept = torch.arange(cache.tokens) if positions is None else positions
                tiers = in_tiers(kept, look.evidence, clock.deadline.order, cache.shape)
            plans = plan(cache, recipe, positions, tiers)
        clock.lap("select")
        outlines = [
            outlined(one, recipe.coder, lambda codec: self._codec_context(codec, context)) for one in plans
        ]

        def closed(count: int, digest: bytes) -> None:
            if selection.when == "after":
                context.remember(delivered(plans[:count], recipe, digest, base))

        return self._framed(context, recipe, outlines, clock, look.draft, base, closed)

    def _fit(
        self, context: Context, recipe: Recipe, look: Look, clock: _Clock, base: Delivered | None
    ) -> Transfer:
        """The largest count of tokens whose transfer fits the byte budget, by measured sizes."""
        budget, tokens = int(recipe.selection.amount.value), context.cache.tokens
        low, high, best = 0, tokens + 1, None
        guess = tokens
        for _ in range(_FIT_ROUNDS + tokens.bit_length()):
            counted = recipe.with_amount(Amount(guess, "count"))
            selection = counted.selection
            if kept_count(selection, tokens) != guess:  # sinks and recent tokens are always in
                guess = kept_count(selection, tokens)
            transfer = self._planned(context, counted, look, clock, base)
            size = transfer.receipt.wire_bytes
            clock.lap("encode")
            if size <= budget:
                low, best = guess, transfer
            else:
                high = guess
            if high - low <= 1 or (
                best is None and guess <= kept_count(replace(selection, amount=Amount(1, "count")), tokens)
            ):
                break
            scaled = int(guess * budget / size)
            guess = min(high - 1, max(low + 1, scaled if low < scaled < high else (low + high) // 2))
        if best is None:
            raise LimitError(
                f"no cache fits {budget} bytes: the smallest transfer takes {size}; send the text instead"
            )
        best.note(clock.stage_s)
        return best

    def _framed(
        self,
        context: Context,
        recipe: Recipe,
        outlines: list[Outline],
        clock: _Clock,
        draft: Answer | None = None,
        base: Delivered | None = None,
        on_closed: Callable[[int, bytes], None] | None = None,
    ) -> Transfer:
        manifest = Manifest(
            transfer_id=clock.transfer_id or bytes(TRANSFER_ID_BYTES),
            fingerprint=self.lm.fingerprint,
            shape=context.cache.shape,
            recipe=recipe,
            prompt=context.prompt,
            context_digest=context.digest,
            text_bytes=len(context.text.encode()) if recipe.mode == "text" else 0,
            sketch=self.lm.sketch if recipe.mode == "kv" else None,
            base=base.base if base else None,
            deadline_ms=clock.deadline.left_ms if clock.deadline else 0,
        )
        headers = [header for header, _ in outlines]
        receipt = Receipt(
            transfer_id=manifest.transfer_id.hex(),
            recipe=str(recipe),
            context_tokens=context.cache.tokens,
            kept_tokens=kept_tokens(headers, recipe),
            kept_share=kept_share(headers, manifest.shape, manifest.base),
            segments=len(outlines),
            element_count=manifest.shape.element_count,
            stage_s=dict(clock.stage_s),
        )
        if clock.progress is not None:
            outlines = reported(outlines, manifest.shape, clock.progress)
        return Transfer(manifest, outlines, receipt, draft, self.chunk_bytes, on_closed, self.added_bytes)


def _require_finite(cache: KVCache) -> None:
    """A cache that every receiver would refuse is refused here. Raises ModelError."""
    try:
        cache.require_finite()
    except CodecError as error:
        raise ModelError(f"the model's own cache of this text cannot be used: {error}") from error


class _Clock:
    """Seconds by stage of one transfer, one lap after another."""

    def __init__(
        self,
        stage_s: Mapping[str, float] | None = None,
        transfer_id: bytes = b"",
        progress: OnProgress | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.transfer_id, self.progress, self.deadline = transfer_id, progress, deadline
        self.stage_s: dict[str, float] = dict(stage_s or {})
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + now - self._last
        self._last = now
