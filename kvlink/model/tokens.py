"""Text to token ids: the template's own control tokens are parsed, everybody else's text stays text.

A context, a question and an earlier turn may contain the markers of a chat template, by chance or by
malice; they must not become control tokens. So texts are cut by a copy of the tokenizer in which every
control token goes by a secret name: `own` writes the template's text with these names, and whatever
else stands between is cut as if the markers were no tokens at all. One pass over the whole text, so the
tokens of context and question are those of the one text that they make together.

Tokenizers that have no such copy (Python ones) cut the text between control tokens piece by piece.

Does not know: prompts, models. Place on the path: between a text and the model.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import tokenizers

_PROBES = (
    "The river bends twice.\n\nAnd again.",
    " 12,345.67 – naïve façade 東京 🙂",
    "\tdef f(x):  return x\n",
    "a",
)
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How tokenizers that fall back to bytes write one."""


class Encoder:
    """Cuts texts for one tokenizer. `control`: the names of its control tokens, real → secret."""

    def __init__(self, tokenizer: Any, written: str = "") -> None:
        """`written`: source of the template; an added token that it writes is a control token too."""
        self._tokenizer = tokenizer
        secret = secrets.token_hex(12)
        names = sorted(control_names(tokenizer, written), key=len, reverse=True)
        self.control = {name: f"kvlink{secret}n{index}e" for index, name in enumerate(names)}
        self._mark = f"kvlink{secret}m"
        self._real = {secret_name: name for name, secret_name in self.control.items()}
        self._names = _any_of(self.control)
        self._secrets = _any_of(self._real)
        unknown = getattr(tokenizer, "unk_token", None)
        self._forbidden = {tokenizer.convert_tokens_to_ids(n) for n in names if n != unknown}
        self._copy = self._renamed_copy()
        if self._copy is not None and not self._copy_is_true():
            self._copy = None
        self.opening = self._opening()

    def guard(self, text: str) -> str:
        """Foreign text as it may go through a chat template: none of its markers is taken for the template's."""
        return self._names.sub(lambda found: found[0][0] + self._mark + found[0][1:], text)

    def own(self, text: str) -> str:
        """Text of the template, with foreign text that `guard` gave in it, ready to be cut."""
        return self._names.sub(lambda found: self.control[found[0]], text).replace(self._mark, "")

    def plain(self, text: str) -> str:
        """What `guard` or `own` gave, as people read it."""
        text = text.replace(self._mark, "")
        return self._secrets.sub(lambda found: self._real[found[0]], text)

    def ids(self, text: str, before: str = "", after: str = "") -> list[int]:
        """Token ids of `text` as it is cut where it stands between `before` and `after`.

        Where a token would reach over a seam the text is cut at the seam.
        """
        if self._copy is None:
            return self._cut_between(text, before)
        found = self._copy.encode(before + text + after, add_special_tokens=False)
        first, last = len(before), len(before) + len(text)
        if stray := self._stray(before + text + after, found):
            parts = ((text, first), (before, 0), (after, last))
            return self.ids(*[self._spelled(part, start, stray) for part, start in parts])
        if any(a < seam < b for a, b in found.offsets for seam in (first, last)):
            return list(self._copy.encode(text, add_special_tokens=False).ids)
        return [i for i, (a, _) in zip(found.ids, found.offsets, strict=True) if first <= a < last]

    def pieces(self, text: str) -> list[str]:
        """The tokens of `ids(text)` as people read them: joined they are the text."""
        if self._copy is None:
            return [self._tokenizer.decode([i]) for i in self.ids(text)]
        found = self._copy.encode(text, add_special_tokens=False)
        if stray := self._stray(text, found):
            return self.pieces(self._spelled(text, 0, stray))
        ends = [b for _, b in found.offsets]
        ends[-1:] = [len(text)] if ends else []  # what is cut off at the end belongs to the last one
        starts = itertools.accumulate(ends[:-1], max, initial=0)
        return [self.plain(text[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _stray(self, text: str, found: Any) -> set[int]:
        """Where secret names stand that were not taken for their tokens: some are only known behind a blank."""
        names = list(self._secrets.finditer(text))
        if not names:
            return set()
        ids = {self._tokenizer.convert_tokens_to_ids(name) for name in self.control}
        taken = [span for i, span in zip(found.ids, found.offsets, strict=True) if i in ids]
        if len(taken) == len(names):
            return set()
        return {m.start() for m in names if not any(a < m.end() and b > m.start() for a, b in taken)}

    def _spelled(self, text: str, start: int, stray: set[int]) -> str:
        """`text`, which begins at `start` of the whole, with its stray names as the template writes them."""
        return self._secrets.sub(
            lambda found: self._real[found[0]] if start + found.start() in stray else found[0], text
        )

    def _opening(self) -> list[int]:
        """Ids that the tokenizer puts before a text (BOS). What it puts behind one closes it: left out."""
        whole = list(self._tokenizer("a")["input_ids"])
        bare = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def _renamed_copy(self) -> Any:
        """The tokenizer with control tokens under their secret names; None where it cannot be had."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            return None
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(_renamed(backend.to_str(), self.control)))
        except Exception:  # the package raises bare Exception for whatever it cannot build
            return None

    def _copy_is_true(self) -> bool:
        """Whether the copy cuts texts as the tokenizer does, its control tokens included."""
        return all(
            self.ids(self.own(text)) == list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (*_PROBES, "x ".join(self.control))
        )

    def _cut_between(self, text: str, before: str) -> list[int]:
        """`ids` of a tokenizer without a copy: after `before` where that leaves its tokens as they are."""
        left, both = self._cut(before), self._cut(before + text)
        return both[len(left) :] if both[: len(left)] == left else self._cut(text)

    def _cut(self, text: str) -> list[int]:
        out: list[int] = []
        for part in re.split(f"({self._secrets.pattern})", text):
            if part in self._real:
                out.append(self._tokenizer.convert_tokens_to_ids(self._real[part]))
            elif part:
                out += self._cut_foreign(part)
        return out

    def _cut_foreign(self, text: str) -> list[int]:
        """Tokens of text without control tokens; a marker that becomes one all the same is broken up."""
        ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if self._forbidden.isdisjoint(ids) or len(text) < 2:
            return [i for i in ids if i not in self._forbidden]
        found = self._names.search(text)
        middle = found.start() + 1 if found and 0 < found.start() + 1 < len(text) else len(text) // 2
        return [*self._cut_foreign(text[:middle]), *self._cut_foreign(text[middle:])]


def control_names(tokenizer: Any, written: str = "") -> set[str]:
    """The control tokens of a tokenizer by name: its special ones, and added ones that `written` has in it.

    Single characters, blanks and bytes (`<0x0A>`) are text in any case.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token.content) for token in added if token.special or token.content in written}
    names |= {str(name) for name in tokenizer.all_special_tokens}
    return {name for name in names if len(name.strip()) > 1 and not BYTE_TOKEN.fullmatch(name)}


def _renamed(source: str, control: dict[str, str]) -> dict[str, Any]:
    """A tokenizer's JSON with other names for control tokens, so that no text can spell them."""
    data: dict[str, Any] = json.loads(source)
    data.update(truncation=None, padding=None, post_processor=None)
    for token in data["added_tokens"]:
        token["content"] = control.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {control.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[control.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in control:
        model["unk_token"] = control[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not _touches(m, control)]
    return data


def _touches(merge: str | list[str], names: Collection[str]) -> bool:
    """Whether a merge makes one of `names` or goes on from it."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of `names`; nothing where there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


_encoders: WeakKeyDictionary[Any, dict[tuple[str, int], Encoder]] = WeakKeyDictionary()


def encoder_for(tokenizer: Any, written: str = "") -> Encoder:
    """The encoder of a tokenizer, made once for as many tokens as it has."""
    known = _encoders.setdefault(tokenizer, {})
    key = (written, len(tokenizer))
    if key not in known:
        known[key] = Encoder(tokenizer, written)
    return known[key]
