"""Token ids to text, a piece at a time: the pieces join to what decoding all the tokens gives.

What later tokens may still change is held back: letters of several bytes that are not whole yet, runs of
bytes that a decoder judges as a whole, and blanks that the tokenizer's clean-up may take away again.

Does not know: models, prompts. Place on the path: behind generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlink.model.tokens import BYTE_TOKEN

_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_REACH = sum(len(pattern) - 1 for pattern in _CLEANED)
"""Characters before the end that clean-up may still change: each replacement sees so many ahead of it."""


class AnswerText:
    """The text of an answer while its tokens come. `stopped`: a stop mark was met, the text ends before it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._reach = _REACH if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._ids: list[int] = []
        self._silent = frozenset(tokenizer.all_special_ids)
        self._in_bytes = False
        self._told = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Take a token; returns the text that is new and that no later token changes."""
        name = self._name(token_id)
        if name is None:
            return ""  # a row of the embedding that stands for no token
        self._ids.append(token_id)
        text = self._text()
        if any(mark in text.lstrip() for mark in self._stops):
            self.stopped = True
            return self.finish()
        if token_id not in self._silent:
            self._in_bytes = BYTE_TOKEN.fullmatch(name) is not None
        if self._in_bytes:
            return ""
        settled = text.rstrip("\ufffd")
        return self._tell(settled[: max(0, len(settled) - self._reach)])

    def finish(self) -> str:
        """The rest, once no token follows."""
        text = self._text()
        lead = len(text) - len(text.lstrip())
        cuts = [at for at in (text.find(mark, lead) for mark in self._stops) if at >= 0]
        return self._tell(text[: min(cuts, default=len(text))])

    def _tell(self, text: str) -> str:
        if len(text) <= len(self._told) or not text.startswith(self._told):
            return ""
        new = text[len(self._told) :]
        self._told = text
        return new

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _name(self, token_id: int) -> str | None:
        try:
            found = self._tokenizer.convert_ids_to_tokens(token_id)
        except (KeyError, IndexError, OverflowError):
            return None
        return None if found is None else str(found)
