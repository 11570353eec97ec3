"""A language model in use: the model, its tokenizer and template, and the texts that it can read.

Does not know: how it was loaded, caches, peers. Place on the path: before it; every step has it at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvlink.cache import DTYPES
from kvlink.errors import ContextError, IdentityError
from kvlink.model.room import most_text_bytes, reading_bytes, require_few_tokens, require_room
from kvlink.model.template import CONTINUED, Template, Turn
from kvlink.model.tokens import Encoder, encoder_for
from kvlink.model.traits import Traits
from kvlink.payload import Fingerprint, Prompt
from kvlink.profile import Profile
from kvlink.sketch import NOT_READ, Sketch

_WINDOWS = ("max_position_embeddings", "max_seq_len", "n_positions", "max_target_positions")
"""What families call the number of positions."""


def window_of(config: Any) -> int:
    """Positions that a model of a configuration can tell apart."""
    text = config.get_text_config(decoder=True)
    told = (getattr(text, name, None) for name in _WINDOWS)
    return next((value for value in told if isinstance(value, int) and value > 0), 2**31)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model with its tokenizer and template. `lock` is held for every forward pass.

    `traits`: what its self-test found. `sketch`: of what it does with a fixed text. `profile`: what is known
    of its caches beforehand, where its folder has one.
    """

    name: str
    model: Any
    tokenizer: Any
    template: Template
    fingerprint: Fingerprint
    attention: str
    profile: Profile | None = None
    sketch: Sketch = NOT_READ
    traits: Traits = field(default_factory=Traits)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def window(self) -> int:
        """Positions that the model can tell apart."""
        return window_of(self.model.config)

    @property
    def dtype(self) -> str:
        return next(name for name, value in DTYPES.items() if value == self.model.dtype)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text that can fit into the window."""
        return most_text_bytes(self.tokenizer, self.window)

    def require_room(self, what: str, *texts: str) -> None:
        """Raise ContextError where texts are together too long for the window, by their bytes alone."""
        require_room(self.tokenizer, self.window, what, *texts)

    def reading_bytes(self, *texts: int) -> int:
        """Memory that texts of so many bytes take while they are cut, beside the cache."""
        return reading_bytes(self.window, *texts)

    @property
    def encoder(self) -> Encoder:
        return encoder_for(self.tokenizer, self.template.written)

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: token ids that the model can read."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return 2**31 if weight is None else len(weight)

    def asking(self, template_id: str) -> LanguageModel:
        """The model as it asks questions over a context of that template. Raises IdentityError for another's."""
        own = self.template
        if template_id.endswith(CONTINUED):
            own = own.continued
        if template_id != own.template_id:
            raise IdentityError(f"prompt template: here {own.template_id}, at the peer {template_id}")
        return replace(self, template=own)

    def context_ids(self, text: str, prompt: Prompt | None = None) -> list[int]:
        """Token ids of before · context · after, as they are cut in one text with a question behind.

        Control tokens come from the template alone: markers inside the context or a turn are text.
        Raises ContextError.
        """
        if not text.strip():
            raise ContextError("the context is empty: nothing to read")
        whole = self._context_text(text, prompt or self.template.prompt())
        ids = self._readable(self.encoder.ids(whole, after=self.encoder.own(self.template.ask("x"))))
        if self.template.special_tokens:
            ids = [*self.encoder.opening, *ids]
        if len(ids) >= self.window:
            raise ContextError(f"the context has {len(ids)} tokens, the model's window {self.window}")
        return ids

    def continued_ids(self, ids: list[int], text: str, more: str, prompt: Prompt) -> tuple[str, list[int]]:
        """Text and token ids of a context of `ids` with `more` behind it and what the template writes after it.

        The ids begin with `ids`. "" as text where no text is cut so: then `more` is cut on its own.
        Raises ContextError.
        """
        if not more.strip():
            raise ContextError("there is nothing to extend the context by")
        after = prompt.after.decode()
        self.require_room("the context", text, more)
        if text:
            joined = text + after + more
            whole = self.context_ids(joined, prompt)
            if whole[: len(ids)] == ids and len(whole) > len(ids):
                return joined, whole
        require_few_tokens(self.encoder.ids, self.window, "what extends the context", more)
        found = [*ids, *self._readable(self.encoder.ids(more + self.encoder.own(after), before="x"))]
        if len(found) >= self.window:
            raise ContextError(
                f"the context would have {len(found)} tokens, the model's window {self.window}"
            )
        return "", found

    def question_ids(self, question: str, context_tokens: int, new_tokens: int = 1) -> list[int]:
        """Token ids of the question's part, as they are cut behind a context.

        Raises ContextError where the window is too small.
        """
        if not question.strip():
            raise ContextError("the question is empty")
        self.require_room("the question", question)
        require_few_tokens(self.encoder.ids, self.window, "the question", question)
        encoder, template = self.encoder, self.template
        asked = encoder.own(template.ask_before) + question + encoder.own(template.ask_after)
        ids = self._readable(encoder.ids(asked, before=self._context_text("x", template.prompt())))
        if context_tokens + len(ids) + new_tokens > self.window:
            raise ContextError(
                f"the question has {len(ids)} tokens; with {context_tokens} of context and {new_tokens} to come "
                f"that is more than the model's window of {self.window}"
            )
        return ids

    def context_pieces(self, text: str, prompt: Prompt, ids: Sequence[int] = ()) -> list[str]:
        """The tokens of `context_ids` as text, for people: joined they are the text. Without one, each of `ids`."""
        if not text:
            return [self.tokenizer.decode([i]) for i in ids]
        opening = [""] * len(self.encoder.opening) if self.template.special_tokens else []
        return [*opening, *self.encoder.pieces(self._context_text(text, prompt))]

    def _context_text(self, text: str, prompt: Prompt) -> str:
        """before · context · after as the encoder takes it."""
        encoder = self.encoder
        around = [turn.content for turn in prompt.turns] if prompt.turns else [prompt.before.decode()]
        self.require_room("the context", text, *around)
        for part in (text, *around):
            require_few_tokens(encoder.ids, self.window, "the context", part)
        if prompt.turns:
            guarded = [Turn(turn.role, encoder.guard(turn.content)) for turn in prompt.turns]
            before = self.template.opening(guarded)
        else:
            before = prompt.before.decode()
        return encoder.own(before) + text + encoder.own(prompt.after.decode())

    def _readable(self, ids: list[int]) -> list[int]:
        """The ids, where the model has an embedding for each. Raises ContextError, naming the token."""
        beyond = max(ids, default=0)
        if beyond >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(beyond)
            raise ContextError(
                f"the tokenizer of {self.name} cuts the text into token {beyond} ({token!r}), but the model has "
                f"{self.embeddings} embeddings: it was never made for that token"
            )
        return ids
