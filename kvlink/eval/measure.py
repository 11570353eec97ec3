"""Measuring one question: every case of a run over one context, in this process.

A case takes the whole path: the sender packs frames, the receiver takes those frames, rebuilds the
cache and answers. Bytes are those of the frames, and of gRPC around them as `transport` computes it
(`kvlink eval overhead` holds that against the kernel's counters). Time on a line is not in it.

Does not know: tables, files, other processes. Place on the path: all of it, without a socket.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvlink.agent.context import Context, Look, evidence_key
from kvlink.agent.receiver import Held, Receiver
from kvlink.agent.sender import Sender
from kvlink.agent.transfer import Transfer
from kvlink.cache import KVCache
from kvlink.codecs import LowRank
from kvlink.compress.select import choose_positions
from kvlink.errors import ContextError, TruncatedError
from kvlink.eval.items import Item, Query, Shift
from kvlink.eval.rows import Outcome
from kvlink.eval.score import exact_match, f1
from kvlink.eval.tables import SPECTRUM_SHARE, Case
from kvlink.model.generate import Answer, answer, divergence, logits_along
from kvlink.model.loading import LanguageModel
from kvlink.payload import DEADLINE_MS
from kvlink.recipe import Recipe, Target
from kvlink.transport.link import added_by_grpc

_CLEAR_MARGIN = 0.5
"""Of log-probabilities; reading tokens together or one by one moves BF16 logits by less than half of it."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the sender itself says to a query: its answer, and log-probabilities `[A, V]` along it."""

    query: Query
    answer: Answer
    log_probs: Tensor


@dataclass(slots=True)
class _Room:
    """What cases over one context share."""

    item: Item
    context: Context
    references: dict[Shift, _Reference]
    looks: dict[tuple[Any, ...], Look]
    frames: dict[tuple[str, bool], tuple[bytes, ...]] = field(default_factory=dict)


class Bench:
    """A sender and a receiver on one model, for measuring."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._sender, self._receiver = (
            Sender(lm, added_bytes=added_by_grpc),
            Receiver(lm, added_bytes=added_by_grpc),
        )

    def measure(self, item: Item, cases: Sequence[Case]) -> dict[str, Any]:
        """Outcomes of all cases that the item has a question for, by key; one line of a record.

        Raises ContextError where the context does not fit the model's window.
        """
        room = _Room(item, self._sender.read(item.context), {}, {})
        wanted = [case for case in cases if item.query(case.shift) is not None]
        outcomes: dict[str, Outcome] = {}
        for recipe in dict.fromkeys(case.recipe for case in wanted):
            outcomes |= self._recipe(room, recipe, [case for case in wanted if case.recipe == recipe])
        return {
            "context_tokens": room.context.cache.tokens,
            "source": item.source,
            "outcomes": {case.key: asdict(outcomes[case.key]) for case in wanted},
        }

    def _recipe(self, room: _Room, text: str, cases: Sequence[Case]) -> dict[str, Outcome]:
        """All cases of one recipe: one transfer serves every question shift."""
        recipe, out = Recipe.parse(text), {}
        packed: tuple[Transfer, Held] | None = None
        for case in cases:
            if case.kind == "spectrum":
                out[case.key] = self._spectrum(room)
            elif case.kind == "masked":
                out[case.key] = self._masked(room, recipe, case)
            elif case.cut < 1:
                out[case.key] = self._cut(room, recipe, case)
            else:
                packed = packed or self._transfer(room, recipe)
                pair = packed if case.kind == "answer" else self._second(room, case, recipe, *packed)
                found = self._answered(room, case, recipe, *pair)
                if case.kind != "answer":
                    more = {"of_first": found.wire_bytes / packed[0].receipt.wire_bytes}
                    found = replace(found, more={**found.more, **more})
                out[case.key] = found
        return out

    def _transfer(self, room: _Room, recipe: Recipe) -> tuple[Transfer, Held]:
        look = self._look(room, recipe) if recipe.mode == "kv" else None
        transfer = self._sender.pack(room.context, room.item.question, recipe, look=look)
        return transfer, self._receiver.receive(transfer.frames)

    def _second(
        self, room: _Room, case: Case, recipe: Recipe, first: Transfer, held: Held
    ) -> tuple[Transfer, Held]:
        """A transfer for the question of the case: whole, or what the first one lacks."""
        base = bytes.fromhex(first.receipt.cache_digest) if case.kind == "added" else b""
        question = self._reference(room, case.shift).query.question
        transfer = self._sender.pack(room.context, question, recipe, base=base)
        return transfer, self._receiver.receive(transfer.frames, base=held)

    def _look(self, room: _Room, recipe: Recipe) -> Look:
        """Evidence of a method, captured once a context. The choice is made for the item's question."""
        chosen = recipe.selection
        key = evidence_key(chosen)
        if key not in room.looks:
            room.looks[key] = self._sender.look(room.context, room.item.question, chosen)
        return room.looks[key]

    def _reference(self, room: _Room, shift: Shift) -> _Reference:
        if shift not in room.references:
            query = room.item.query(shift)
            if query is None:
                raise ContextError(f"no {shift} question for this context")
            own = self._sender.answer(room.context, query.question)
            log_probs = self._along(room.context.cache, query.question, own)
            room.references[shift] = _Reference(query, own, log_probs)
        return room.references[shift]

    def _along(self, cache: KVCache, question: str, own: Answer, visible: Tensor | None = None) -> Tensor:
        """Log-probabilities `[A, V]` float64 along an answer."""
        return logits_along(self.lm, cache, question, own, visible).log_softmax(-1)

    def _answered(self, room: _Room, case: Case, recipe: Recipe, transfer: Transfer, held: Held) -> Outcome:
        own = self._reference(room, case.shift)
        began = time.perf_counter()
        log_probs = self._along(held.cache, own.query.question, own.answer)
        told, first_s = own.answer, time.perf_counter() - began
        if not _follows(log_probs, own.answer):
            told = self._receiver.answer(held, own.query.question)
            first_s = told.first_token_s
        receipt = transfer.receipt
        stages = [*receipt.stage_s.values(), *held.receipt.stage_s.values(), first_s]
        return replace(
            self._judge(room, own, told, log_probs),
            wire_bytes=receipt.wire_bytes,
            bits_per_element=receipt.bits_per_element,
            ttft_s=sum(stages),
            kept_tokens=receipt.kept_tokens or receipt.context_tokens,
            more=_energy(room.context.cache, held.cache) if isinstance(recipe.codec, LowRank) else {},
        )

    def _cut(self, room: _Room, recipe: Recipe, case: Case) -> Outcome:
        """Answer from what has closed when a share of the transfer's bytes has come.

        `answered`: 1, or 0 where nothing has closed. `kept_share`: of the context's positions.
        """
        own = self._reference(room, case.shift)
        frames = self._cuttable(room, recipe, case.tiers)
        ends = list(itertools.accumulate(len(frame) for frame in frames))
        came = frames[: bisect.bisect_right(ends, case.cut * ends[-1])]
        size = sum(map(len, came))
        try:
            held = self._receiver.receive(came, partial=True)
        except TruncatedError:
            nothing = Answer("", (), 0.0, 0.0)
            outcome = self._judge(room, own, nothing, own.log_probs)
            return replace(
                outcome, agrees=False, wire_bytes=size, kept_tokens=0, kl=None, kl_most=None,
                more={"answered": 0.0, "kept_share": 0.0},
            )  # fmt: skip
        told = self._receiver.answer(held, own.query.question)
        log_probs = self._along(held.cache, own.query.question, own.answer)
        return replace(
            self._judge(room, own, told, log_probs),
            wire_bytes=size,
            bits_per_element=8 * size / held.receipt.element_count,
            ttft_s=told.first_token_s,
            kept_tokens=held.receipt.kept_tokens,
            more={"answered": 1.0, "kept_share": held.receipt.kept_share},
        )

    def _cuttable(self, room: _Room, recipe: Recipe, tiers: bool) -> tuple[bytes, ...]:
        """The frames of a transfer, packed once a context."""
        key = (str(recipe), tiers)
        if key not in room.frames:
            target = Target(deadline_s=DEADLINE_MS / 1e3) if tiers else None
            packed = self._sender.pack(room.context, room.item.question, recipe, target)
            room.frames[key] = packed.frames
        return room.frames[key]

    def _judge(self, room: _Room, own: _Reference, told: Answer, log_probs: Tensor) -> Outcome:
        """Scores and divergence of an answer; what travelled is filled in by the caller."""
        golds, rules = own.query.answers, room.item.rules
        nats = divergence(own.log_probs, log_probs)
        return Outcome(
            answer=told.text,
            own_answer=own.answer.text,
            f1=f1(told.text, golds, rules),
            f1_full=f1(own.answer.text, golds, rules),
            em=exact_match(told.text, golds, rules),
            agrees=told.text == own.answer.text,
            wire_bytes=0,
            bits_per_element=0.0,
            ttft_s=0.0,
            context_tokens=room.context.cache.tokens,
            kept_tokens=room.context.cache.tokens,
            kl=float(nats.mean()),
            kl_most=float(nats.max()),
        )

    def _masked(self, room: _Room, recipe: Recipe, case: Case) -> Outcome:
        """The full cache with the dropped positions hidden, and zeroed where the case says so.

        `logit_error`: the largest difference of log-probabilities, of the masked cache to the pruned
        one, of the zeroed one to the one that is only masked.
        """
        own, cache = self._reference(room, case.shift), room.context.cache
        kept = choose_positions(self._look(room, recipe).evidence, recipe.selection, cache.shape)
        visible = torch.zeros(cache.tokens, dtype=torch.bool)
        visible[kept] = True
        shown = _zeroed(cache, visible) if case.zeroed else cache
        question = own.query.question
        told = answer(self.lm, shown, question, visible=visible)
        log_probs = self._along(shown, question, own.answer, visible)
        if case.zeroed:
            other = self._along(cache, question, own.answer, visible)
        else:
            other = self._along(cache.select(kept), question, own.answer)
        error = float((log_probs - other).abs().max())
        outcome = self._judge(room, own, told, log_probs)
        return replace(outcome, kept_tokens=len(kept), more={"logit_error": error})

    def _spectrum(self, room: _Room) -> Outcome:
        """Share of the energy that the largest singular values of each layer hold."""
        own = self._reference(room, "same")
        shares: dict[str, float] = {}
        for index, layer in enumerate(room.context.cache.layers):
            for side, tensor in (("keys", layer.keys), ("values", layer.values)):
                matrix = tensor.float().cpu().transpose(0, 1).flatten(1)
                energy = torch.linalg.svdvals(matrix).double().square()
                most = max(1, round(SPECTRUM_SHARE * len(energy)))
                shares[f"{side}/{index}"] = float(energy[:most].sum() / energy.sum().clamp(min=1e-30))
        return replace(self._judge(room, own, own.answer, own.log_probs), more=shares)


def _follows(log_probs: Tensor, own: Answer) -> bool:
    """Whether greedy generation gives `own`, told from one pass along it.

    Each of its tokens must be the likeliest after the ones before, by more than the last bits of a
    cache's dtype can move: then a token at a time gives the same. Otherwise nothing is said.
    """
    best = log_probs.topk(2, -1)
    margin = (best.values[:, 0] - best.values[:, 1]).min()
    return best.indices[:, 0].tolist() == list(own.token_ids) and float(margin) > _CLEAR_MARGIN


def _zeroed(cache: KVCache, visible: Tensor) -> KVCache:
    """The cache with zeros at the positions that are not visible, sliding windows as they are."""
    layers = []
    for layer in cache.layers:
        if not layer.sliding:
            shown = visible.to(layer.keys.device)[None, :, None]
            layer = replace(layer, keys=layer.keys * shown, values=layer.values * shown)
        layers.append(layer)
    return replace(cache, layers=tuple(layers))


def _energy(full: KVCache, found: KVCache) -> dict[str, float]:
    """Share of the energy that survived: 1 − ‖x − x̂‖² ÷ ‖x‖², mean over the layers."""
    out = {}
    for side in ("keys", "values"):
        pairs = [
            (getattr(a, side).float().cpu(), getattr(b, side).float().cpu())
            for a, b in zip(full.layers, found.layers, strict=True)
        ]
        shares = [1 - float((a - b).square().sum() / a.square().sum().clamp(min=1e-30)) for a, b in pairs]
        out[f"energy_{side}"] = sum(shares) / len(shares)
    return out
