"""The handshake: what two agents are and can do, compared with what a transfer will need, before any of it is made.

    require_spoken   protocol, mode, codecs, coders: what both releases speak
    require_same     the model: fingerprint, dtype, sketch
    require_room     sizes, as soon as they are known: the receiver's limits
    compare          all of it

Each error names both sides' values, and what to change. What an agent does not say of itself is not compared.

Does not know: how capabilities travel. Place on the path: in front of prefill at a sender, of a fetch at a receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvlink.codecs import AUTO_CALIBRATION, NO_CALIBRATION, Codec, Transform, name_of
from kvlink.errors import IdentityError, LimitError, RecipeError, RemoteProtocolError
from kvlink.payload import Mode
from kvlink.receipt import Capabilities, Spoken
from kvlink.recipe import AUTO, Recipe


@dataclass(frozen=True, slots=True)
class Needed:
    """What a transfer needs of its receiver; 0 and empty for what is not known (yet).

    `codecs`, `coders`: by their names. `calibration`: digest of the profile that its codes will name, of
    `profile_bytes` where the sender can send it ahead. `frame_bytes`: of its largest frame. `new_tokens`: of
    the answer that is asked for afterwards.
    """

    mode: Mode | Literal[""] = ""
    codecs: tuple[str, ...] = ()
    coders: tuple[str, ...] = ()
    segments: int = 0
    calibration: bytes = b""
    profile_bytes: int = 0
    context_tokens: int = 0
    cache_bytes: int = 0
    frame_bytes: int = 0
    text_bytes: int = 0
    new_tokens: int = 0

    def sized(self, tokens: int, cache_bytes: int, text: str, chunk_bytes: int) -> Needed:
        """The same for a context of `tokens`: a text, or a cache of so many bytes before anything is left out."""
        if self.mode == "text":
            return replace(self, context_tokens=tokens, text_bytes=len(text.encode()))
        frame_bytes = min(chunk_bytes, cache_bytes)
        return replace(self, context_tokens=tokens, cache_bytes=cache_bytes, frame_bytes=frame_bytes)


_LIMITS = {
    "context_tokens": (
        "max_context_tokens",
        "a context of {} tokens",
        "send less text",
        "max-context-tokens",
    ),
    "cache_bytes": ("max_cache_bytes", "a cache of {} bytes", "send less text", "max-cache"),
    "frame_bytes": ("max_frame_bytes", "a frame of {} bytes", "send smaller chunks", "max-frame"),
    "segments": ("max_segments", "{} segments", "leave out rest=", "max-segments"),
    "text_bytes": ("max_text_bytes", "a text of {} bytes", "send less text", "max-text"),
    "new_tokens": ("max_new_tokens", "an answer of {} tokens", "ask for fewer", "max-new-tokens"),
    "profile_bytes": ("max_profile_bytes", "a profile of {} bytes", "use basis=own", "max-profiles"),
}
"""What is needed → the receiver's limit for it, in words, what to do here, the receiver's option."""


def needed_by(recipe: Recipe | str) -> Needed:
    """What a recipe alone says of its transfer; a calibration only once it has its name. `recipe`: also as a
    caller's words, of which none, and `auto`, leave it to the sender. Raises RecipeError."""
    if isinstance(recipe, str):
        return Needed() if recipe in ("", AUTO) else needed_by(Recipe.parse(recipe))
    if recipe.mode == "text":
        return Needed("text", coders=(recipe.coder,), segments=1)
    codecs: list[Codec] = [recipe.codec, *([recipe.background] if recipe.background is not None else [])]
    coders = {"identity", recipe.coder, *("rans" for codec in codecs if isinstance(codec, Transform))}
    calibration = recipe.codec.calibration
    return Needed(
        "kv",
        codecs=tuple(dict.fromkeys(map(name_of, codecs))),
        coders=tuple(sorted(coders)),
        segments=len(codecs),
        calibration=b"" if calibration in (None, AUTO_CALIBRATION) else bytes.fromhex(calibration),
    )


def compare(here: Capabilities, there: Capabilities, needed: Needed) -> None:
    """Raise where a transfer from `here` to `there` cannot be: see the functions of this module."""
    require_spoken(here.spoken, there.spoken, needed)
    require_same(here, there, needed)
    require_room(there, needed)


def require_spoken(here: Spoken, there: Spoken, needed: Needed) -> None:
    """Raise RemoteProtocolError where no protocol version is common, RecipeError where one side does not speak
    what the recipe takes."""
    if max(here.protocol_min, there.protocol_min) > min(here.protocol_max, there.protocol_max):
        older = "the peer" if there.protocol_max < here.protocol_min else "this side"
        raise RemoteProtocolError(
            f"protocol: {_range(here)} here, {_range(there)} at the peer; {older} needs a newer release"
        )
    modes = (needed.mode,) if needed.mode else ()
    for what, names in (("mode", modes), ("codec", needed.codecs), ("coder", needed.coders)):
        mine, theirs = (getattr(side, f"{what}s") for side in (here, there))
        for name in names:
            if name not in mine or name not in theirs:
                raise RecipeError(
                    f"{what} {name}: here {_list(mine)}, at the peer {_list(theirs)}; "
                    "name a recipe that both speak, or bring the other side to this release"
                )


def require_same(here: Capabilities, there: Capabilities, needed: Needed) -> None:
    """Raise IdentityError where the two do not hold the same model, as far as the mode needs it; where it is not
    known yet, as far as every mode does."""
    here.fingerprint.require_match(there.fingerprint, needed.mode or "text")
    if needed.mode != "kv":
        return
    if here.dtype != there.dtype:
        raise IdentityError(
            f"dtype: here {here.dtype}, at the peer {there.dtype}; start one of them with the other's --dtype"
        )
    if here.sketch is not None:
        here.sketch.require_match(there.sketch)


def require_room(there: Capabilities, needed: Needed) -> None:
    """Raise LimitError where the receiver takes less than is needed, IdentityError where it lacks a
    calibration that nobody can send."""
    held = needed.calibration in there.profiles
    if needed.calibration and not held and not needed.profile_bytes:
        raise IdentityError(
            f"profile {needed.calibration.hex()[:12]} is neither at the peer nor here; use basis={NO_CALIBRATION}"
        )
    for name, (limit, words, instead, option) in _LIMITS.items():
        wanted, most = getattr(needed, name), there.limits.get(limit, 0)
        if most and wanted > most and not (name == "profile_bytes" and held):
            raise LimitError(
                f"{words.format(f'{wanted:,}')}, the receiver takes at most {most:,}: {instead}, "
                f"or raise its --{option}"
            )


def _range(side: Spoken) -> str:
    if side.protocol_min == side.protocol_max:
        return str(side.protocol_min)
    return f"{side.protocol_min} to {side.protocol_max}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
