"""Prompt templates: what stands around a context, and how a question is asked.

    text = before · context · after           (this is what the cache holds)
    ask  = the question's part                (read by whoever answers)

A context that somebody else wrote and read (`Sender.adopt`) may have nothing around it: its question continues it, by
the template's `continued` form.

Both ends own the template; its hash is a component of the fingerprint, so that a difference is
refused, not guessed. Base models use `plain/1`; models with a chat template use it.

Does not know: caches, peers. Place on the path: before prefill and before generation.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import transformers
from blake3 import blake3

from kvlink.errors import ConfigError, ContextError, ModelError
from kvlink.payload import Prompt
from kvlink.payload import Turn as Turn

_CONTEXT = "\x02kvlink-context\x03"
_QUESTION = "\x02kvlink-question\x03"
CONTINUED = "/continued"
"""How the id of a template's `continued` form ends."""
MOST_OPTIONS = 4096
"""Characters of template options."""
_OURS = frozenset(inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages",
    "strftime_now",
    "raise_exception",
}
"""Names that are not a template's to take."""


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
    options: tuple[tuple[str, Any], ...] = ()
    """What the template's program is given beside the conversation, such as `enable_thinking`."""
    written: str = ""
    """The program, and what it writes around turns of every role: markers may be put together from pieces."""

    @property
    def source(self) -> str:
        """The program that writes the prompt; empty for the plain template."""
        return str(self.chat.chat_template) if self.chat is not None else ""

    @property
    def dated(self) -> bool:
        """Whether the program writes the day on which it runs, so that another day's prompt is another."""
        return "strftime_now" in self.source

    @property
    def is_continued(self) -> bool:
        return self.template_id.endswith(CONTINUED)

    @property
    def continued(self) -> Template:
        """The form for a context with nothing around it: a question is the next turn of a conversation, or the
        next lines of a text.

        Raises ModelError where the chat template writes earlier turns in another way once there are later ones.
        """
        if self.is_continued:
            return self
        before, after = f"\n{self.ask_before}", self.ask_after
        if self.chat is not None:
            before, after = _next_turn(self.chat, dict(self.options))
        return replace(
            self,
            template_id=self.template_id + CONTINUED,
            before="",
            after="",
            ask_before=before,
            ask_after=after,
        )

    def opening(self, turns: Sequence[Turn] = ()) -> str:
        """What stands before the context, earlier turns in it."""
        if turns and self.chat is not None:
            return _render_chat(self.chat, turns, dict(self.options))[0]
        return "".join(f"{t.role.capitalize()}: {t.content}\n" for t in turns) + self.before

    def prompt(self, turns: Sequence[Turn] = ()) -> Prompt:
        """What the manifest says of the text around the context. Raises ContextError."""
        if turns and self.is_continued:
            raise ContextError("a context with nothing around it has its earlier turns in itself")
        return Prompt(self.template_id, self.opening(turns).encode(), self.after.encode(), tuple(turns))

    def ask(self, question: str) -> str:
        return self.ask_before + question + self.ask_after


def plain_template() -> Template:
    """`Context: … / Question: … / Answer:` for base models; an answer ends with its line."""
    return Template("plain/1", "Context: ", "\n", "Question: ", "\nAnswer:", ("\n",), True)


def template_for(tokenizer: Any, options: Mapping[str, Any] | None = None) -> Template:
    """The tokenizer's chat template where it has one, else the plain one.

    `options`: see `options_from`. They are part of the template's id, and so of what both ends compare.
    Raises ConfigError where there is no chat template to take them, or it knows no option of that name.
    """
    given = dict(sorted((options or {}).items()))
    if not getattr(tokenizer, "chat_template", None):
        if given:
            raise ConfigError(f"the model has no chat template that could take {', '.join(given)}")
        return plain_template()
    source = str(tokenizer.chat_template)
    if unknown := [name for name in given if not re.search(rf"\b{name}\b", source)]:
        raise ConfigError(f"the model's chat template has no option {', '.join(unknown)}")
    before, after, ask_before, ask_after = _render_chat(tokenizer, (), given)
    identity = source if not given else f"{source}\x00{json.dumps(given, sort_keys=True)}"
    digest = blake3(identity.encode()).hexdigest(length=8)
    told = tuple(given.items())
    written = source + _written(tokenizer, given)
    return Template(
        f"chat/{digest}", before, after, ask_before, ask_after, (), False, tokenizer, told, written
    )


def _written(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """What a chat template writes in conversations of every role; "" for one that it does not take."""
    asked, answered = Turn("user", "x"), Turn("assistant", "x")
    out: list[str] = []
    for turns in ((), (asked, answered), (Turn("system", "x"),), (Turn("system", "x"), asked, answered)):
        with contextlib.suppress(ModelError):
            out += _render_chat(tokenizer, turns, options)
    return "\n".join(out)


def options_from(text: str) -> dict[str, Any]:
    """Template options from a JSON object of plain values: `{"enable_thinking": false}`; "" is none.

    Raises ConfigError.
    """
    if len(text) > MOST_OPTIONS:
        raise ConfigError(f"template options have at most {MOST_OPTIONS:,} characters, got {len(text):,}")
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"template options are a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"template options are a JSON object, got {text!r}")
    for name, value in found.items():
        if not name.isidentifier() or name in _OURS:
            raise ConfigError(f"{name!r} cannot be a template option")
        if not isinstance(value, (str, bool, int, float, type(None))):
            raise ConfigError(f"template option {name}: a plain value is expected, got {value!r}")
    return found


def _render_chat(
    tokenizer: Any, turns: Sequence[Turn], options: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    """Before, after, and the two sides of the question, cut out of a rendered conversation."""
    asked = Turn("user", f"Context: {_CONTEXT}\n\nQuestion: {_QUESTION}")
    text = _rendered(tokenizer, (*turns, asked), options, ask=True)
    if text.count(_CONTEXT) != 1 or text.count(_QUESTION) != 1:
        raise ModelError("the model's chat template does not keep the text of a user's turn as it is")
    before, _, rest = text.partition(_CONTEXT)
    between, _, ask_after = rest.partition(_QUESTION)
    after, ask_before = between[:2], between[2:]  # the blank line belongs to the context
    return before, after, ask_before, ask_after


def _next_turn(tokenizer: Any, options: Mapping[str, Any]) -> tuple[str, str]:
    """The two sides of a user's next turn, behind a conversation that an answer has ended. Raises ModelError."""
    told = (Turn("user", "x"), Turn("assistant", "x"))
    before = _rendered(tokenizer, told, options, ask=False)
    text = _rendered(tokenizer, (*told, Turn("user", _QUESTION)), options, ask=True)
    if not text.startswith(before) or text.count(_QUESTION) != 1:
        raise ModelError(
            "the model's chat template does not write a conversation so that it can be continued"
        )
    ask_before, _, ask_after = text.removeprefix(before).partition(_QUESTION)
    return ask_before, ask_after


def _rendered(tokenizer: Any, turns: Sequence[Turn], options: Mapping[str, Any], *, ask: bool) -> str:
    """A conversation as the chat template writes it; `ask`: with the opening of the answer. Raises ModelError."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **options)
        )
    except Exception as error:  # templates are programs of their own and may raise anything
        raise ModelError(f"the model's chat template cannot render the conversation: {error}") from error
