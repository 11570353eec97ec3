"""A text that cannot fit into the window is refused before it is cut, and nothing that fits is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.errors import ContextError
from kvlink.model.loading import load
from kvlink.model.room import longest_token_bytes, most_text_bytes, require_few_tokens


class Watched:
    """A tokenizer that remembers the longest text it was asked to cut."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.longest = tokenizer, 0

    def __call__(self, text, **options):
        self.longest = max(self.longest, len(text))
        return self._tokenizer(text, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture
def watched(tiny):
    return replace(tiny, tokenizer=Watched(tiny.tokenizer))


LONG = {
    "words": "Jand Faris was born in Nibo. " * 500_000,
    "one letter": "a" * 5_000_000,
    "spaces": " " * 5_000_000 + "x",
    "wide letters": "世界" * 500_000,
    "line ends": "\n" * 5_000_000 + "x",
}


@pytest.mark.parametrize("name", LONG)
def test_a_text_beyond_the_window_is_never_cut(watched, name):
    for cut in (watched.context_ids, lambda text: watched.question_ids(text, 0)):
        with pytest.raises(ContextError, match="the model's window 2048 holds at most"):
            cut(LONG[name])
    assert watched.tokenizer.longest < 100, "more than the few words that its encoder tries"


def test_the_bound_follows_the_window_and_the_vocabulary(tiny):
    longest = longest_token_bytes(tiny.tokenizer)
    assert longest == max(len(token.encode()) for token in tiny.tokenizer.get_vocab())
    assert tiny.text_bytes == 2048 * longest
    assert most_text_bytes(tiny.tokenizer, 2**31) == 16_000_000, "a window without an end has one here"


def test_a_token_that_is_added_counts():
    tokenizer = load().tokenizer
    before = longest_token_bytes(tokenizer)
    tokenizer.add_tokens(["x" * (before + 5)])
    assert longest_token_bytes(tokenizer) == before + 5


LM = None


@given(st.text(max_size=4000))
def test_what_fits_the_window_fits_the_bound(text):
    """The oracle is the tokenizer: no text of few tokens is refused for its length."""
    global LM
    LM = LM or load()
    tokens = len(LM.tokenizer(text)["input_ids"])
    assert len(text.encode()) <= most_text_bytes(LM.tokenizer, tokens)


@pytest.mark.parametrize("half", ["\ud800", "a \udc80 b"])
def test_halves_of_characters_are_named(tiny, half):
    with pytest.raises(ContextError, match="the question is not whole"):
        tiny.question_ids(half, 0)


def test_a_text_of_too_many_tokens_costs_no_more_than_a_little_more_than_the_window(tiny):
    """Within the bound of bytes, where the window is long and tokens are short: cut piece by piece, and no further."""
    cut: list[int] = []

    def ids(piece: str) -> list[int]:
        found = tiny.encoder.ids(piece)
        cut.append(len(found))
        return found

    with pytest.raises(ContextError, match="tokens or more: that is more than the model's window of 30000"):
        require_few_tokens(ids, 30_000, "the context", "1 2 " * 1_000_000)
    assert sum(cut) < 1.25 * 30_000 + max(cut) + 100


PIECES = {
    "words": "Jand Faris was born in Nibo. ",
    "one letter": "a",
    "wide letters": "世界",
    "markers": "<|endoftext|>",
    "spaces": "   x ",
}


@pytest.mark.parametrize("name", PIECES)
def test_a_text_that_just_fits_is_never_taken_for_too_long(tiny, name):
    text = PIECES[name] * (200_000 // len(PIECES[name]))
    window = len(tiny.encoder.ids(text))
    require_few_tokens(tiny.encoder.ids, window, "the context", text)
    require_few_tokens(lambda piece: [0] * (len(piece) // 4), window, "the context", text[: 4 * window])


def test_memory_of_a_text_has_the_window_for_its_bound(tiny):
    assert tiny.reading_bytes(0) == 0
    assert 120 * 100 < tiny.reading_bytes(100, 20) < 120 * 500, "a short text is not refused for its memory"
    assert tiny.reading_bytes(10**6) - 4 * 10**6 == tiny.reading_bytes(10**7) - 4 * 10**7
