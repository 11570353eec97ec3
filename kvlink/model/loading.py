"""Loading: a decoder-only transformers model by name or path, or the embedded one.

Refuses what kvlink does not understand by name: other cache layers, rotary embeddings that
change with length, encoders. Weights come from safetensors only; remote code never runs.

Does not know: contexts, peers. Place on the path: before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvlink.cache import DTYPES
from kvlink.defaults import ATTENTION, DEVICE, DTYPE
from kvlink.errors import (
    ConfigError,
    ContextError,
    IdentityError,
    KvlinkError,
    ModelError,
    UnsupportedCacheError,
)
from kvlink.model.fingerprint import fingerprint_of, stamp
from kvlink.model.language import LanguageModel as LanguageModel
from kvlink.model.language import window_of
from kvlink.model.probe import remembered_sketch
from kvlink.model.self_test import traits_of
from kvlink.model.sources import EMBEDDED as EMBEDDED
from kvlink.model.sources import embedded_folder as embedded_folder
from kvlink.model.sources import folder_of, with_all_weights
from kvlink.model.template import options_from, template_for
from kvlink.profile import Profile

PROFILE_FILE = "kvlink.profile"
"""A profile of this name in a model's folder is used with it."""
_LAYER_TYPES = ("full_attention", "sliding_attention")
_CHANGING_ROPE = ("dynamic", "longrope")
_PICKED = ("keep_window_size", "index_topk", "indexer_budget", "index_topk_blocks")
"""Fields that say how many keys are attended to where there are more."""
_WINDOW_OF_CACHE_ONLY = ("moshi", "kyutai_speech_to_text")
"""Their cache forgets what is outside `sliding_window`, their attention in one read does not."""


def load(
    name: str = EMBEDDED,
    *,
    device: str = DEVICE,
    dtype: str = DTYPE,
    attention: str = ATTENTION,
    template_options: str = "",
) -> LanguageModel:
    """Load a model. `dtype`: auto, bfloat16, float16 or float32. `template_options`: a JSON object.

    Raises ModelError or UnsupportedCacheError, naming what is not understood.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    options = options_from(template_options)
    folder = folder_of(name)
    source = str(folder or name)
    transformers.utils.logging.disable_progress_bar()
    try:
        before = stamp(folder or _snapshot(source))
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_config(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model = with_all_weights(*loaded)
        model.to(device)
    except KvlinkError:
        raise
    except Exception as error:  # foreign code: configurations and tokenizers fail in any way
        words = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot load {name!r}: {words}") from error
    folder = folder or _snapshot(source)
    # What was replaced while it was read is not what the files say now.
    lm = wrap(name, model, tokenizer, before if before == stamp(folder) else None, options)
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


def language_model(model: Any = EMBEDDED, tokenizer: Any = None, **options: str) -> LanguageModel:
    """A model to work with, from what people have: a name or a path (see `load`), a transformers model that is in
    memory together with its tokenizer, or a `LanguageModel`, which is returned as it is.

    `options`: for `load`; of a model in memory `template_options` alone, the rest is decided. Raises ConfigError,
    ModelError.
    """
    if isinstance(model, transformers.PreTrainedModel):
        if tokenizer is None:
            raise ConfigError(f"a {type(model).__name__} needs its tokenizer beside it")
        templates = options_from(options.pop("template_options", ""))
        if options:
            raise ConfigError(f"the model is loaded already: {', '.join(options)} cannot be chosen any more")
        source = str(getattr(model, "name_or_path", "") or type(model).__name__)
        lm = wrap(source, model, tokenizer, template_options=templates)
        file = Path(source) / PROFILE_FILE
        with contextlib.suppress(IdentityError):  # another model's by now: its weights were changed in memory
            return with_profile(lm, file) if file.is_file() else lm
        return lm
    if tokenizer is not None:
        raise ConfigError("a tokenizer goes with a transformers model that is in memory")
    if isinstance(model, str):
        return load(model, **options)
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"expected a name, a path or a transformers model, got a {type(model).__name__}")
    if options:
        raise ConfigError(f"the model is loaded already: {', '.join(options)} cannot be chosen any more")
    return model


def wrap(
    name: str,
    model: Any,
    tokenizer: Any,
    files: list[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A `LanguageModel` around a transformers model that is already in memory.

    `files`: as in `fingerprint_of`, where it is known what the model was loaded from. `template_options`: what
    its chat template is given beside the conversation.
    """
    check_config(model.config)
    model.eval()
    if model.dtype not in DTYPES.values():
        raise UnsupportedCacheError(f"the cache dtype must be one of {', '.join(DTYPES)}, got {model.dtype}")
    template = template_for(tokenizer, template_options)
    fingerprint = fingerprint_of(model, tokenizer, template, files)
    lm = LanguageModel(name, model, tokenizer, template, fingerprint, model.config._attn_implementation)
    try:
        lm.question_ids("x", len(lm.context_ids("x")))
    except ContextError as error:
        raise ModelError(f"{name}: the template itself cannot be read: {error}") from error
    lm = replace(lm, traits=traits_of(lm, lasting=bool(files)))
    return replace(lm, sketch=remembered_sketch(model, fingerprint, files))


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
    window = window_of(config)
    for name in _PICKED:
        most = getattr(text, name, None)
        if isinstance(most, int) and most < window:
            raise UnsupportedCacheError(
                f"{config.model_type}: attention that picks {most} of its keys ({name}) is not understood"
            )
    if (
        config.model_type in _WINDOW_OF_CACHE_ONLY
        and (getattr(text, "sliding_window", None) or window) < window
    ):
        raise UnsupportedCacheError(
            f"{config.model_type}: its cache slides ({text.sliding_window} tokens) where its attention does not"
        )
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
