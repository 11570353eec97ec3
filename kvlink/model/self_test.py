"""The self-test: what a model does with a cache is tried when it is loaded, not assumed from its name.

A few forwards of at most 64 tokens of its own vocabulary, remembered by what the model is:

    restore      a cache that left and came back gives the logits of one that never left, and both those of
                 one read of the whole text; else the model is refused
    selection    a cache without some positions gives the logits of the whole one with these masked
    scope=head   no head looks at another's keys or values, so that each may keep positions of its own
    attention    what attends to what can be seen, so that a question may choose
    rotation     unrotated keys are the same at every position, and `on` undoes `off`

Selection is tried over many more keys too, repeated ones, since some attention changes its ways where there are many.
What only long texts show (windows that slide, rotations that change with length) is read from the configuration
(`loading.check_config`). A use that does not pass is refused by name; numbers that are wrong are never let through.

Does not know: recipes, codecs, peers. Place on the path: before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvlink._release import RELEASE
from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.errors import KvlinkError, UnsupportedCacheError
from kvlink.model import remembered, rotary
from kvlink.model.forward import forward, parameters
from kvlink.model.generate import next_logits
from kvlink.model.language import LanguageModel
from kvlink.model.prefill import new_cache, read_question
from kvlink.model.probe import in_float32
from kvlink.model.restore import extract, view
from kvlink.model.traits import Traits, Use

VERSION = 3
"""Of the test: another number forgets what was remembered."""
_CONTEXT, _QUESTION = 40, 8
_CROWD = 4096
"""Most keys that a question is read over."""
_CROWD_NUMBERS = 2**27
"""Most numbers of all these keys and values: 256 MB in half precision."""
_EQUAL = 1e-3, 0.2
"""Most difference of logits that are the same by two ways of computing: root mean square, as a share of theirs.
The second where weights are quantized, and arithmetic with them."""
_SAME = 1e-4, 0.03
"""The same of logits whose ways differ in the order of a sum at most."""


def traits_of(lm: LanguageModel, *, lasting: bool = True) -> Traits:
    """The traits of a model. `lasting`: they may be remembered; not those of a model that was made in memory,
    for what was changed in it beside its weights is in no fingerprint.

    Raises UnsupportedCacheError where not even a whole cache can be restored.
    """
    key = _key(lm)
    known = Traits.from_json(remembered.recall("self-test", key)) if lasting else None
    if known is None:
        known = _Test(lm).run()
        if lasting:
            remembered.remember("self-test", key, known.to_json())
    return known


def _key(lm: LanguageModel) -> list[str]:
    mark = lm.fingerprint
    versions = (torch.__version__, transformers.__version__, RELEASE, str(VERSION))
    own = (mark.weights.hex(), mark.architecture.hex(), mark.rotary.hex())
    return [*own, type(lm.model).__name__, lm.dtype, lm.attention, str(lm.model.device.type), *versions]


class _Test:
    """One model's self-test, in order. `lm` gains what is found as it is found."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.kind = str(lm.model.config.model_type)
        windows = [int(layer.sliding_window) for layer in new_cache(lm).layers if layer.is_sliding]
        room = min([_CONTEXT + _QUESTION, lm.window, *windows]) - 1
        if room < _QUESTION + 4:
            raise UnsupportedCacheError(
                f"{self.kind}: a window of {room + 1} tokens is too short to be tested"
            )
        self.context = min(_CONTEXT, room - _QUESTION)
        drawn = torch.randperm(self._readable(), generator=torch.Generator().manual_seed(0))
        ids = drawn.repeat(-(-64 // len(drawn)))[: self.context + _QUESTION].tolist()
        self.ids, self.question = ids[: self.context], ids[self.context :]
        self.kept = torch.tensor(sorted({0, 1, *range(3, self.context, 3), self.context - 1}))

    def run(self) -> Traits:
        # Rounding in half precision would hide what a small model does, or look like it.
        with torch.inference_mode(), in_float32(self.lm.model):
            with self._named("reading a short text with a cache"):
                cache = self._restored()
            shape = cache.layers[0].keys.shape
            self._gain(Traits(kv_heads=shape[0], head_size=shape[2]))
            refused: dict[Use, str] = {}
            for use, test in (
                ("selection", self._selection),
                ("scope=head", self._heads),
                ("attention", lambda: self._attention(cache)),
                ("transform", self._rotation),
            ):
                try:
                    with self._named(use):
                        test()
                except UnsupportedCacheError as error:
                    refused[use] = str(error)  # type: ignore[index]
        return replace(self.lm.traits, refused={**self._consequences(refused), **refused})

    def _consequences(self, refused: dict[Use, str]) -> dict[Use, str]:
        """What selection by head and during the prefill need beyond selection itself."""
        out: dict[Use, str] = {}
        layers = new_cache(self.lm).layers
        if self.lm.traits.padded or "selection" in refused:
            why = f"{self.kind}: its attention counts keys instead of knowing their positions"
            out["scope=head"] = out["when=during"] = refused.get("selection", why)
        elif any(layer.is_sliding for layer in layers):
            out["when=during"] = f"{self.kind}: layers with a sliding window count tokens by index"
        elif "position_ids" not in parameters(self.lm.model):
            out["when=during"] = f"{self.kind}: it cannot be told the positions of tokens"
        return out

    def _gain(self, traits: Traits) -> None:
        self.lm = replace(self.lm, traits=traits)

    def _restored(self) -> KVCache:
        """A whole cache, once it has passed. Restoring is never having left, and as good as one read."""
        both, tokens = [*self.ids, *self.question], self.context
        whole = self._read(both, None, 0)
        cache = new_cache(self.lm)
        alone = self._read(self.ids, cache, 0)
        self._require(
            alone, whole[:tokens], "later tokens change what earlier ones give: its attention is an encoder's"
        )
        if not any(layer.keys is not None for layer in cache.layers):
            raise UnsupportedCacheError(f"{self.kind}: it keeps no cache of keys and values")
        try:
            held = extract(cache, tokens)
        except UnsupportedCacheError as error:
            raise UnsupportedCacheError(f"{self.kind}: {error}") from error
        copies = tuple(replace(x, keys=x.keys.clone(), values=x.values.clone()) for x in held.layers)
        left = next_logits(self.lm, view(self.lm, KVCache(copies, tokens)), self.question, tokens)
        stayed = self._read(self.question, cache, tokens)
        self._require(
            left,
            stayed,
            "a cache that was taken out and put back gives other logits than one that stayed",
            _SAME,
        )
        self._require(left, whole[tokens:], "context then question gives other logits than one read of both")
        return KVCache(copies, tokens)

    def _selection(self) -> None:
        """Pruned is masked: at once, or at full length with a mask. All layers as full ones, for at so few
        tokens a window has not slid."""
        cache = DynamicCache()
        self._read(self.ids, cache, 0)
        held = extract(cache, self.context)
        seen = torch.zeros(self.context, dtype=torch.bool)
        seen[self.kept] = True
        masked = self._continued(held, seen)
        full = self._continued(held, None)
        if float((full - masked).abs().max()) == 0:
            raise UnsupportedCacheError(
                f"{self.kind}: its attention takes no mask, so nothing tells what pruning may do"
            )
        pruned = held.select(self.kept)
        turned = held.select(
            self.kept.flip(0)
        )  # the same keys in another order: only their content may count
        for padded in (False, True):
            if padded and any(layer.is_sliding for layer in new_cache(self.lm).layers):
                break
            self._gain(replace(self.lm.traits, padded=padded))
            with contextlib.suppress(UnsupportedCacheError), self._named("a pruned cache"):
                found = self._continued(pruned, None)
                self._require(found, masked, "pruned is not masked")
                self._require(self._continued(turned, None), found, "the order of keys counts", _SAME)
                if not padded:
                    self._crowded(held)
                return
        self._gain(replace(self.lm.traits, padded=False))
        raise UnsupportedCacheError(
            f"{self.kind}: a cache without some positions gives other logits than masking them"
        )

    def _crowded(self, held: KVCache) -> None:
        """Among many keys the same holds: only their content counts, and pruned is masked (where no layer
        slides, for a mask would hide keys from these too). Some attention is local, or picks its keys, only then."""
        own: list[Any] = new_cache(self.lm).layers
        numbers = 2 * self.lm.traits.kv_heads * self.lm.traits.head_size * len(own)
        tokens = min(_CROWD, self.lm.window - _QUESTION, _CROWD_NUMBERS // numbers)
        if tokens <= self.context:
            return
        layers = []
        for layer, whole in zip(own, held.layers, strict=True):
            count = min(tokens, int(layer.sliding_window) - 1) if layer.is_sliding else tokens
            at = torch.arange(tokens - count, tokens) % self.context
            places = full_positions(len(whole.keys), count, tokens - count)
            layers.append(LayerCache(whole.keys[:, at], whole.values[:, at], places, bool(layer.is_sliding)))
        crowd = KVCache(tuple(layers), tokens)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
        found = self._among(crowd, None)
        self._require(
            self._among(crowd.select(order), None), found, "among many keys their order counts", _SAME
        )
        if not any(layer.sliding for layer in crowd.layers):
            kept = order[: tokens // 2].sort().values
            seen = torch.zeros(tokens, dtype=torch.bool)
            seen[kept] = True
            masked = self._among(crowd, seen)
            self._require(
                self._among(crowd.select(kept), None), masked, "pruned is not masked among many keys"
            )

    def _among(self, held: KVCache, visible: Tensor | None) -> Tensor:
        return next_logits(self.lm, view(self.lm, held), self.question, held.tokens, visible)

    def _heads(self) -> None:
        """Every head of every layer has its keys in an order of its own: only their content may count."""
        if self.lm.traits.padded:
            return  # refused already: all heads hold the same positions then
        cache = DynamicCache()
        self._read(self.ids, cache, 0)
        held = extract(cache, self.context)
        sets = len(held.layers), self.lm.traits.kv_heads, self.context
        orders = torch.rand(sets, generator=torch.Generator().manual_seed(0)).argsort(-1)
        self._require(
            self._continued(held.select(orders), None),
            self._continued(held, None),
            "its heads look at each other's keys or values",
            _SAME,
        )

    def _continued(self, held: KVCache, visible: Tensor | None) -> Tensor:
        """Logits of the question over a cache whose layers all count as full ones."""
        state = view(self.lm, held, DynamicCache())
        return next_logits(self.lm, state, self.question, held.tokens, visible)

    def _attention(self, cache: KVCache) -> None:
        """Evidence has the right shape, sees the context, and no more than there is."""
        found = read_question(self.lm, cache, self.question[:-2], self.question[-2:])
        expected = (len(cache.layers), self.lm.traits.kv_heads, self.context)
        full = [index for index, layer in enumerate(cache.layers) if not layer.sliding]
        for part in (found.question, found.draft):
            if part is None or tuple(part.shape) != expected or not bool(part.isfinite().all()):
                raise UnsupportedCacheError(f"{self.kind}: its attention weights cannot be seen")
            masses = part[full].sum(-1)
            if part.min() < 0 or (full and not 0 < float(masses.max()) <= 1.01):
                raise UnsupportedCacheError(
                    f"{self.kind}: its attention weights are no shares of what is attended to"
                )

    def _rotation(self) -> None:
        """How each layer's keys turn, from single tokens at positions of their own."""
        model, places = self.lm.model, rotary.trial_places(self.lm.window)
        token, rows = self.ids[0], len(places)
        cache = DynamicCache()
        given = {
            "input_ids": torch.full((rows, 1), token, device=model.device),
            "position_ids": places[:, None].to(model.device),
            "past_key_values": cache,
            "use_cache": True,
        }
        taken = parameters(model)
        layers: list[Any]
        if "position_ids" in taken:
            with self.lm.lock:
                model(**{name: value for name, value in given.items() if name in taken})
            layers = list(cache.layers)
            keys = [layer.keys[:, :, 0].cpu() for layer in layers]
        else:  # then only a text of one repeated token gives it positions
            places = torch.arange(self.context)
            self._read([token] * self.context, cache, 0)
            layers = list(cache.layers)
            keys = [layer.keys[0].transpose(0, 1).cpu() for layer in layers]
        found = rotary.find(model, keys, places)
        if None in found:
            raise UnsupportedCacheError(
                f"{self.kind}: the keys of layer {found.index(None)} are rotated in a way that is not understood"
            )
        arrangements = tuple(a for a in found if a is not None)
        for turn in rotary.rotations(model, arrangements, self.context):
            sample = torch.randn(2, self.context, keys[0].shape[-1], dtype=torch.float64)
            at = torch.arange(self.context).expand(2, -1)
            if not torch.allclose(turn.on(turn.off(sample, at), at), sample, atol=1e-9):
                raise UnsupportedCacheError(f"{self.kind}: a rotation cannot be taken off and put on again")
        self._gain(replace(self.lm.traits, arrangements=arrangements))

    def _read(self, ids: list[int], cache: object, seen: int) -> Tensor:
        mask = torch.ones(seen + len(ids), dtype=torch.long)
        with self.lm.lock:
            found = forward(self.lm.model, ids, cache, torch.arange(seen, seen + len(ids)), mask)
        return found.float().cpu()

    def _require(
        self, found: Tensor, expected: Tensor, otherwise: str, limits: tuple[float, float] = _EQUAL
    ) -> None:
        """Raise UnsupportedCacheError with `otherwise` unless the logits are the same. Not-a-number is not."""
        if found.shape == expected.shape:
            off, size = (found - expected).square().mean().sqrt(), expected.square().mean().sqrt()
            if bool(off <= limits[bool(getattr(self.lm.model, "is_quantized", False))] * size):
                return
        raise UnsupportedCacheError(f"{self.kind}: {otherwise}")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Whatever a model's own code raises becomes one line that names the model and what was tried."""
        try:
            yield
        except KvlinkError:
            raise
        except Exception as error:  # foreign code: a model may fail in any way
            words = str(error).strip().splitlines()
            told = f"{type(error).__name__}: {words[0] if words else ''}"
            raise UnsupportedCacheError(f"{self.kind}: {what} fails: {told}") from error

    def _readable(self) -> int:
        """Token ids that the model and its tokenizer have."""
        return max(2, min(self.lm.embeddings, int(getattr(self.lm.model.config, "vocab_size", 2**31)), 2**20))
