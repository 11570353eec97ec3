"""How many bytes of text a model's window can hold: known before a text is cut into tokens.

Cutting costs seconds and hundreds of bytes a token, so a text that cannot fit is refused by its length.

Does not know: prompts, peers. Place on the path: in front of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
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


def require_room(tokenizer: Any, window: int, what: str, *texts: str) -> None:
    """Raise ContextError where texts have half a character, or are together too long for the window whatever
    their tokens are."""
    most = most_text_bytes(tokenizer, window)
    size = sum(map(len, texts))
    if size <= most:
        size = sum(len(whole(text, what).encode()) for text in texts)
    if size > most:
        raise ContextError(
            f"{what} has {size:,} bytes or more; the model's window {window} holds at most {most:,}"
        )


def require_few_tokens(cut: Callable[[str], Sized], window: int, what: str, text: str) -> None:
    """Raise ContextError as soon as pieces of `text` have clearly more tokens than the window.

    So no text costs more than cutting a little more than a window. A text of few characters is not looked
    at: cutting it all is as cheap. `cut`: the tokens of a piece.
    """
    if len(text) <= _SURELY_CHEAP * window:
        return
    most, count = window + window // 4 + 64, 0  # a seam between two pieces may add a few
    for start in range(0, len(text), _PIECE):
        count += len(cut(text[start : start + _PIECE]))
        if count > most:
            raise ContextError(
                f"{what} has {count:,} tokens or more: that is more than the model's window of {window}"
            )


def reading_bytes(window: int, *texts: int) -> int:
    """Memory that texts of so many bytes and their tokens take while they are cut, about."""
    size = sum(texts)
    return 4 * size + _CUT_BYTES * min(size, 2 * window)


_PIECE = 16_384
_SURELY_CHEAP = 4
_CUT_BYTES = 400
"""Memory for each byte of text while it is cut: 270 where every byte is a token, 150 where tokens have five."""
