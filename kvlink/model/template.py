"""Prompt templates: what stands around a context, and how a question is asked.

    text = before · context · after           (this is what the cache holds)
    ask  = the question's part                (read by whoever answers)

Both ends own the template; its hash is a component of the fingerprint, so that a difference is
refused, not guessed. Base models use `plain/1`; models with a chat template use it.

Does not know: caches, peers. Place on the path: before prefill and before generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from kvlink.errors import ModelError
from kvlink.payload import Prompt
from kvlink.payload import Turn as Turn

_CONTEXT = "\x02kvlink-context\x03"
_QUESTION = "\x02kvlink-question\x03"


@dataclass(frozen=True, slots=True)
class Template:
    """A rendered template. `ask` has one place for the question; `stops` end an answer."""

    template_id: str
    before: str
    after: str
    ask_before: str
    ask_after: str
    stops: tuple[str, ...]
    special_tokens: bool
    """Whether the tokenizer's own opening tokens (BOS) stand before the text."""
    chat: Any = None

    @property
    def source(self) -> str:
        """The program that writes the prompt; empty for the plain template."""
        return str(self.chat.chat_template) if self.chat is not None else ""

    @property
    def dated(self) -> bool:
        """Whether the program writes the day on which it runs, so that another day's prompt is another."""
        return "strftime_now" in self.source

    def opening(self, turns: Sequence[Turn] = ()) -> str:
        """What stands before the context, earlier turns in it."""
        if turns and self.chat is not None:
            return _render_chat(self.chat, turns)[0]
        return "".join(f"{t.role.capitalize()}: {t.content}\n" for t in turns) + self.before

    def prompt(self, turns: Sequence[Turn] = ()) -> Prompt:
        """What the manifest says of the text around the context."""
        return Prompt(self.template_id, self.opening(turns).encode(), self.after.encode(), tuple(turns))

    def ask(self, question: str) -> str:
        return self.ask_before + question + self.ask_after


def plain_template() -> Template:
    """`Context: … / Question: … / Answer:` for base models; an answer ends with its line."""
    return Template("plain/1", "Context: ", "\n", "Question: ", "\nAnswer:", ("\n",), True)


def template_for(tokenizer: Any) -> Template:
    """The tokenizer's chat template where it has one, else the plain one."""
    if not getattr(tokenizer, "chat_template", None):
        return plain_template()
    before, after, ask_before, ask_after = _render_chat(tokenizer, ())
    digest = blake3(str(tokenizer.chat_template).encode()).hexdigest(length=8)
    return Template(f"chat/{digest}", before, after, ask_before, ask_after, (), False, tokenizer)


def _render_chat(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, str, str, str]:
    """Before, after, and the two sides of the question, cut out of a rendered conversation."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    messages.append({"role": "user", "content": f"Context: {_CONTEXT}\n\nQuestion: {_QUESTION}"})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of their own and may raise anything
        raise ModelError(f"the model's chat template cannot render the conversation: {error}") from error
    if text.count(_CONTEXT) != 1 or text.count(_QUESTION) != 1:
        raise ModelError("the model's chat template does not keep the text of a user's turn as it is")
    before, _, rest = text.partition(_CONTEXT)
    between, _, ask_after = rest.partition(_QUESTION)
    after, ask_before = between[:2], between[2:]  # the blank line belongs to the context
    return before, after, ask_before, ask_after
