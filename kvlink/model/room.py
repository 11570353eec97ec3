"""How many bytes of text a model's window can hold: known before a text is cut into tokens.

Cutting costs seconds and hundreds of bytes a token, so a text that cannot fit is refused by its length.

Does not know: prompts, peers. Place on the path: in front of the tokenizer.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from kvlink import bounds
from kvlink.errors import ContextError
from kvlink.texts import whole

_longest: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
"""Tokenizer → number of its tokens when it was looked at, bytes of the longest one."""


def longest_token_bytes(tokenizer: Any) -> int:
    """UTF-8 bytes of the longest token as its vocabulary writes it: at least what it stands for."""
    count = len(tokenizer)
    known = _longest.get(tokenizer)
    if known is None or known[0] != count:
        known = (
            count,
            max((len(str(token).encode(errors="replace")) for token in tokenizer.get_vocab()), default=1),
        )
        _longest[tokenizer] = known
    return known[1]


def most_text_bytes(tokenizer: Any, window: int) -> int:
    """UTF-8 bytes of text that can fit into a window of so many tokens."""
    return min(window * longest_token_bytes(tokenizer), bounds.TEXT.most)


def require_room(tokenizer: Any, window: int, text: str, what: str) -> None:
    """Raise ContextError where `text` has half a character, or is too long for the window whatever its
    tokens are."""
    most = most_text_bytes(tokenizer, window)
    size = len(text) if len(text) > most else len(whole(text, what).encode())
    if size > most:
        raise ContextError(
            f"{what} has {size:,} bytes or more; the model's window {window} holds at most {most:,}"
        )
