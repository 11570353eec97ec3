"""Loading: a decoder-only transformers model by name or path, or the embedded one.

Refuses what kvlink does not understand by name: other cache layers, rotary embeddings that
change with length, encoders. Weights come from safetensors only; remote code never runs.

Does not know: contexts, peers. Place on the path: before it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvlink.cache import DTYPES
from kvlink.defaults import ATTENTION, DEVICE, DTYPE
from kvlink.errors import ConfigError, ContextError, ModelError, UnsupportedCacheError
from kvlink.model.fingerprint import fingerprint_of, stamp
from kvlink.model.probe import remembered_sketch
from kvlink.model.room import most_text_bytes, require_room
from kvlink.model.sources import EMBEDDED as EMBEDDED
from kvlink.model.sources import embedded_folder as embedded_folder
from kvlink.model.sources import folder_of
from kvlink.model.template import Template, Turn, template_for
from kvlink.model.tokens import Encoder, encoder_for
from kvlink.payload import Fingerprint, Prompt
from kvlink.profile import Profile
from kvlink.sketch import Sketch

PROFILE_FILE = "kvlink.profile"
"""A profile of this name in a model's folder is used with it."""
_LAYER_TYPES = ("full_attention", "sliding_attention")
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model with its tokenizer and template. `lock` is held for every forward pass.

    `profile`: what is known of its caches beforehand, where its folder has one.
    """

    name: str
    model: Any
    tokenizer: Any
    template: Template
    fingerprint: Fingerprint
    sketch: Sketch
    attention: str
    profile: Profile | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def window(self) -> int:
        """Positions that the model can tell apart."""
        return int(getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", 2**31))

    @property
    def dtype(self) -> str:
        return next(name for name, value in DTYPES.items() if value == self.model.dtype)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text that can fit into the window."""
        return most_text_bytes(self.tokenizer, self.window)

    @property
    def encoder(self) -> Encoder:
        return encoder_for(self.tokenizer, self.template.source)

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: token ids that the model can read."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return 2**31 if weight is None else len(weight)

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

    def question_ids(self, question: str, context_tokens: int, new_tokens: int = 1) -> list[int]:
        """Token ids of the question's part, as they are cut behind a context.

        Raises ContextError where the window is too small.
        """
        if not question.strip():
            raise ContextError("the question is empty")
        require_room(self.tokenizer, self.window, question, "the question")
        encoder, template = self.encoder, self.template
        asked = encoder.own(template.ask_before) + question + encoder.own(template.ask_after)
        ids = self._readable(encoder.ids(asked, before=self._context_text("x", template.prompt())))
        if context_tokens + len(ids) + new_tokens > self.window:
            raise ContextError(
                f"the question has {len(ids)} tokens; with {context_tokens} of context and {new_tokens} to come "
                f"that is more than the model's window of {self.window}"
            )
        return ids

    def context_pieces(self, text: str, prompt: Prompt) -> list[str]:
        """The tokens of `context_ids` as text, for people: joined they are the text."""
        opening = [""] * len(self.encoder.opening) if self.template.special_tokens else []
        return [*opening, *self.encoder.pieces(self._context_text(text, prompt))]

    def _context_text(self, text: str, prompt: Prompt) -> str:
        """before · context · after as the encoder takes it."""
        encoder = self.encoder
        around = "".join(turn.content for turn in prompt.turns) if prompt.turns else prompt.before.decode()
        require_room(self.tokenizer, self.window, around + text, "the context")
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


def load(
    name: str = EMBEDDED, *, device: str = DEVICE, dtype: str = DTYPE, attention: str = ATTENTION
) -> LanguageModel:
    """Load a model. `dtype`: auto, bfloat16, float16 or float32.

    Raises ModelError or UnsupportedCacheError, naming what is not understood.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    folder = folder_of(name)
    source = str(folder or name)
    transformers.utils.logging.disable_progress_bar()
    try:
        before = stamp(folder or _snapshot(source))
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_config(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.to(device)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {name!r}: {str(error).strip().splitlines()[0]}") from error
    folder = folder or _snapshot(source)
    # What was replaced while it was read is not what the files say now.
    lm = wrap(name, model, tokenizer, before if before == stamp(folder) else None)
    file = folder / PROFILE_FILE if folder else None
    return with_profile(lm, file) if file and file.is_file() else lm


def with_profile(lm: LanguageModel, file: Path) -> LanguageModel:
    """The model with the profile of a file. Raises CodecError, IdentityError where it is another's."""
    try:
        profile = Profile.from_bytes(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the profile {file}: {error.strerror}") from error
    profile.require_match(lm.fingerprint)
    return replace(lm, profile=profile)


def wrap(name: str, model: Any, tokenizer: Any, files: list[Any] | None = None) -> LanguageModel:
    """A `LanguageModel` around a transformers model that is already in memory.

    `files`: as in `fingerprint_of`, where it is known what the model was loaded from.
    """
    check_config(model.config)
    model.eval()
    if model.dtype not in DTYPES.values():
        raise UnsupportedCacheError(f"the cache dtype must be one of {', '.join(DTYPES)}, got {model.dtype}")
    template = template_for(tokenizer)
    fingerprint = fingerprint_of(model, tokenizer, template, files)
    sketch = remembered_sketch(model, fingerprint, files)
    attention = model.config._attn_implementation
    lm = LanguageModel(name, model, tokenizer, template, fingerprint, sketch, attention)
    try:
        lm.question_ids("x", len(lm.context_ids("x")))
    except ContextError as error:
        raise ModelError(f"{name}: the template itself cannot be read: {error}") from error
    return lm


def check_config(config: Any) -> None:
    """Refuse by name what a restored cache could not stand for."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedCacheError(
            f"{config.model_type} is an encoder-decoder; kvlink needs a decoder-only model"
        )
    text = config.get_text_config(decoder=True)
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise UnsupportedCacheError(
                f"{config.model_type}: attention layers of kind {kind!r} are not understood"
            )
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedCacheError(
                f"{config.model_type}: cache layer {type(layer).__name__} is not understood"
            )
    if getattr(text, "attention_chunk_size", None):
        raise UnsupportedCacheError(f"{config.model_type}: chunked attention is not understood")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type") or parameters.get("type")
        if kind in _CHANGING_ROPE:
            raise UnsupportedCacheError(
                f"{config.model_type}: rotary embedding {kind!r} changes with length, so a restored key would be wrong"
            )


def _snapshot(name: str) -> Path | None:
    """The directory in a hub's cache that holds a checkpoint, None where there is none yet."""
    path = transformers.utils.try_to_load_from_cache(name, "config.json")
    return Path(path).parent if isinstance(path, str) else None
