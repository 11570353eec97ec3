"""The receiver: takes a transfer, rebuilds the cache and answers from it.

`Intake` is the receiver's whole path up to the answer:

    deframe → check identity → decode → hold            (text mode: read the text → hold)

Does not know: sockets (the service does). Place on the path: its second half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from transformers.cache_utils import DynamicCache

from kvlink.agent.builder import Builder
from kvlink.agent.profiles import Profiles
from kvlink.agent.transfer import count_bytes
from kvlink.agent.uses import require_usable
from kvlink.cache import KVCache
from kvlink.codecs import AUTO_CALIBRATION, Codec, Transform
from kvlink.compress.codecs import CodecContext
from kvlink.compress.lossless import unpack_part
from kvlink.errors import (
    CodecError,
    IdentityError,
    LimitError,
    NotFoundError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.calibrate import rotation
from kvlink.model.exchange import GenerateInputs, generate_inputs, to_dynamic_cache
from kvlink.model.generate import Answer, Step, answer, generate
from kvlink.model.loading import EMBEDDED, LanguageModel, language_model
from kvlink.model.prefill import prefill
from kvlink.model.restore import cache_shape, join
from kvlink.payload import CacheShape, Part, Prompt, SegmentHeader
from kvlink.profile import Profile
from kvlink.receipt import Receipt
from kvlink.transport.link import AddedBytes, added_by_nothing
from kvlink.wire.file import read_frames
from kvlink.wire.layout import kept_share, kept_tokens
from kvlink.wire.messages import Manifest
from kvlink.wire.session import (
    GroupReceived,
    Limits,
    ManifestReceived,
    ReceiveSession,
    SegmentClosed,
    SegmentOpened,
    TransferComplete,
)


@dataclass(frozen=True, slots=True)
class Held:
    """A context that the receiver can answer from, and what it cost to get it."""

    cache: KVCache
    receipt: Receipt
    template_id: str = ""
    """Of the template that the context was written in; "" is the model's own."""
    context_digest: bytes = b""

    @property
    def kept(self) -> int:
        """Positions in each set."""
        full = [layer.positions.shape[1] for layer in self.cache.layers if not layer.sliding]
        return full[0] if full else self.cache.tokens

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def wipe(self) -> None:
        """Zero the cache; nobody may be using it."""
        self.cache.wipe()


class Intake:
    """One transfer on its way in. `take` frames until `held` is there."""

    def __init__(
        self,
        lm: LanguageModel,
        limits: Limits | None = None,
        profiles: Mapping[str, Profile] | None = None,
        added_bytes: AddedBytes = added_by_nothing,
    ) -> None:
        """`profiles`: what senders have sent ahead, by digest in hex, beside the model's own. `added_bytes`: of the
        link that it comes over."""
        self._lm, self._added_bytes = lm, added_bytes
        self._profiles = {} if profiles is None else profiles
        self.session = ReceiveSession(limits)
        self.held: Held | None = None
        self.needed_bytes = 0
        """Memory that the transfer will take, known once the manifest has been checked."""
        self._builder: Builder | None = None
        self._text: Part | None = None
        self._decode_s = 0.0
        self._frame_bytes: list[int] = []

    @property
    def manifest(self) -> Manifest | None:
        return self.session.manifest

    def begin(self, base: Held | None) -> None:
        """Give it the cache that the manifest names as its base, which is copied. Raises NotFoundError where
        there is none, RemoteProtocolError and IdentityError where it is not what the manifest says of it."""
        manifest, named = self.session.told(), self.session.told().base
        if named is None:
            return
        if base is None or base.receipt.cache_digest != named.digest.hex():
            raise NotFoundError(
                f"base {named.digest.hex()} is not here: never held, expired, or another peer's; send all of it"
            )
        if base.template_id != manifest.prompt.template_id:
            raise IdentityError(f"prompt template: the base's is {base.template_id}, the transfer's another")
        same = base.cache.tokens == manifest.shape.tokens
        if same and base.context_digest != manifest.context_digest:
            raise IdentityError("the base is a cache of another context")
        kept = base.kept
        if (base.cache.tokens, kept) != (named.tokens, named.kept):
            raise RemoteProtocolError(
                f"the base has {kept} positions of {base.cache.tokens} tokens, the manifest says "
                f"{named.kept} of {named.tokens}"
            )
        self._builder = Builder(manifest.shape, self._context_of, base.cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that have come."""
        return sum(self._frame_bytes)

    @property
    def segments(self) -> int:
        """Segments that have closed: what they bring may be used."""
        return len(self.session.closed)

    def take(self, frame: bytes) -> None:
        """Take one frame. Raises what the session and the builder raise, and IdentityError."""
        self._frame_bytes.append(len(frame))
        for event in self.session.receive(frame):
            if isinstance(event, ManifestReceived):
                self._check(event.manifest)
            elif isinstance(event, SegmentOpened):
                self._open(event.header)
            elif isinstance(event, GroupReceived):
                self._take_group(event)
            elif isinstance(event, SegmentClosed):
                self._close()
            elif isinstance(event, TransferComplete):
                self.held = self.hold()

    def release(self) -> None:
        """Let go of the cache and the coded bytes; the session still tells where it is."""
        self.held = None
        self._builder = self._text = None

    def _open(self, header: SegmentHeader) -> None:
        if self._builder is not None:
            self._builder.open(header)
        elif header.adds != "text":
            raise NotFoundError("the base of this transfer is not here")

    def _take_group(self, event: GroupReceived) -> None:
        builder = self._builder
        if builder is None:
            self._text = event.group.parts[0]
        else:
            self._timed(lambda: builder.add(event.place, event.group))

    def _close(self) -> None:
        if self._builder is not None:
            self._timed(self._builder.close)
            if self._builder.cache is not None:
                self._builder.cache.require_finite()

    def _timed(self, step: Callable[[], None]) -> None:
        began = time.perf_counter()
        step()
        self._decode_s += time.perf_counter() - began

    def _check(self, manifest: Manifest) -> None:
        """Identity before bytes: refuse another model, tokenizer or prompt, and say which."""
        lm = self._lm
        lm.fingerprint.require_match(manifest.fingerprint, manifest.mode)
        self._check_prompt(manifest.prompt)
        shape = manifest.shape
        if shape.tokens >= lm.window:
            raise IdentityError(f"the context has {shape.tokens} tokens, the model's window {lm.window}")
        if manifest.text_bytes > lm.text_bytes:
            raise LimitError(
                f"the text has {manifest.text_bytes:,} bytes; "
                f"the model's window {lm.window} holds at most {lm.text_bytes:,}"
            )
        own_shape = cache_shape(lm, shape.tokens)
        if manifest.mode == "kv":
            _check_shape(shape, own_shape)
            require_usable(lm, manifest.recipe)
            lm.sketch.require_match(manifest.sketch)
            self._context_of(manifest.recipe.codec)
            self._builder = None if manifest.base else Builder(shape, self._context_of)
        # Coded bytes and the rebuilt cache exist together for a moment.
        self.needed_bytes = 2 * own_shape.cache_bytes + lm.reading_bytes(manifest.text_bytes)

    def _check_prompt(self, there: Prompt) -> None:
        """Refuse what this model's own template does not write around a context after these earlier turns."""
        lm = self._lm
        said = sum(len(turn.content.encode()) for turn in there.turns)
        if said > lm.text_bytes:
            raise LimitError(
                f"earlier turns of {said:,} bytes; the model's window {lm.window} holds at most {lm.text_bytes:,}"
            )
        lm = self._lm.asking(there.template_id)
        here = lm.template.prompt(there.turns)
        for name in ("before", "after"):
            mine, theirs = getattr(here, name), getattr(there, name)
            if mine != theirs:
                raise IdentityError(
                    f"prompt: {name} the context, with {len(there.turns)} earlier turns, the template writes "
                    f"{len(mine)} bytes here, {mine[:60]!r}, and {len(theirs)} at the peer, {theirs[:60]!r}"
                    + ("; it writes the day: read the context again today" if lm.template.dated else "")
                )

    def hold(self) -> Held:
        """What the segments that have closed make. Raises TruncatedError where none has."""
        manifest, builder, closed = self.session.manifest, self._builder, self.session.closed
        if manifest is None or not (closed or manifest.base):
            raise TruncatedError(f"no segment has closed, in {len(self._frame_bytes)} frames")
        began = time.perf_counter()
        if builder is None and self._text is not None:
            cache: KVCache | None = self._read(manifest, self._text)
            stage_s = {"read": time.perf_counter() - began}
        else:
            cache = builder.cache if builder is not None else None
            stage_s = {"decode": self._decode_s}
        if cache is None:
            raise CodecError("the segments bring no whole layer")
        if builder is None:
            cache.require_finite()
        return Held(
            cache,
            Receipt(
                transfer_id=manifest.transfer_id.hex(),
                recipe=str(manifest.recipe),
                context_tokens=cache.tokens,
                kept_tokens=kept_tokens(closed, manifest.recipe),
                kept_share=kept_share(closed, manifest.shape, manifest.base),
                element_count=manifest.shape.element_count,
                segments=len(closed),
                stage_s=stage_s,
                bytes=count_bytes(self._frame_bytes, self.session.part_bytes, self._added_bytes),
                cache_digest=self.session.cache_digest.hex(),
            ),
            manifest.prompt.template_id,
            manifest.context_digest,
        )

    def _context_of(self, codec: Codec) -> CodecContext:
        """What decoding needs to know of the model. Raises IdentityError where a profile is not here."""
        if not isinstance(codec, Transform) or self.session.manifest is None:
            return CodecContext()
        tokens = self.session.manifest.shape.tokens
        return CodecContext(rotation(self._lm, tokens), self._find_profile(codec))

    def _find_profile(self, codec: Codec) -> Profile | None:
        """The profile that a codec names. Raises IdentityError where it is not here."""
        named = codec.calibration
        if named is None:
            return None
        if named == AUTO_CALIBRATION:
            raise IdentityError("the manifest does not say which profile its codes belong to")
        own = self._lm.profile
        if own is not None and own.digest.hex() == named:
            return own
        try:
            return self._profiles[named]
        except KeyError:
            raise IdentityError(
                f"profile {named[:12]} is not here; send it first, or use basis=own"
            ) from None

    def _read(self, manifest: Manifest, part: Part) -> KVCache:
        """Text mode: the receiver reads the text itself, in the sender's prompt."""
        try:
            text = unpack_part(part).decode()
        except UnicodeDecodeError as error:
            raise CodecError(f"the text is not UTF-8: {error}") from error
        ids = self._lm.asking(manifest.prompt.template_id).context_ids(text, manifest.prompt)
        if len(ids) != manifest.shape.tokens:
            raise IdentityError(f"the text has {len(ids)} tokens here, {manifest.shape.tokens} at the sender")
        return prefill(self._lm, ids)


def _check_shape(there: CacheShape, here: CacheShape) -> None:
    """Raise IdentityError unless a cache of that shape is one that this model would make."""
    for name in ("layers", "kv_heads", "head_size", "dtype", "whole_layers"):
        mine, theirs = getattr(here, name), getattr(there, name)
        if mine != theirs:
            raise IdentityError(f"{name.replace('_', ' ')}: here {mine}, at the peer {theirs}")


class Receiver:
    """Takes transfers and answers from them."""

    def __init__(
        self,
        model: Any = EMBEDDED,
        tokenizer: Any = None,
        *,
        added_bytes: AddedBytes = added_by_nothing,
        **options: str,
    ) -> None:
        """`model`, `tokenizer`, `options`: see `model.loading.language_model`. `added_bytes`: of the link that
        transfers come over, for receipts."""
        self.lm, self.added_bytes = language_model(model, tokenizer, **options), added_bytes
        self.profiles = Profiles()

    def add_profile(self, data: bytes, peer: str = "") -> Profile:
        """Take a profile that a sender has sent ahead, against the share of `peer`.

        Raises what `read_profile` raises, LimitError, BusyError.
        """
        with self.profiles.room(len(data), peer) as keep:
            profile = self.read_profile(data)
            keep(profile)
        return profile

    def read_profile(self, data: bytes) -> Profile:
        """The profile in a file. Raises CodecError, IdentityError where it is another model's or shape's."""
        profile = Profile.from_bytes(data)
        profile.require_match(self.lm.fingerprint)
        shape = cache_shape(self.lm, 1)
        found = (len(profile.keys), profile.keys[0].mean.numel())
        if found != (shape.layers, shape.kv_heads * shape.head_size):
            raise IdentityError(
                f"the profile has {found[0]} layers of {found[1]} channels, the model has others"
            )
        return profile

    def known_profiles(self) -> list[str]:
        """Digests in hex of the profiles that transfers may name."""
        own = [self.lm.profile.digest.hex()] if self.lm.profile else []
        return [*own, *self.profiles]

    def receive(
        self,
        frames: Iterable[bytes],
        limits: Limits | None = None,
        *,
        partial: bool = False,
        base: Held | None = None,
    ) -> Held:
        """Take a whole transfer. `partial`: where it was cut, what had closed by then is enough. `base`: what a
        transfer adds to that names a base; it stays as it is.

        Raises TruncatedError where the frames end too early: before the end, or before a segment has closed;
        NotFoundError where the transfer adds to another base.
        """
        intake = Intake(self.lm, limits, self.profiles, self.added_bytes)
        try:
            for number, frame in enumerate(frames):
                intake.take(frame)
                if number == 0:
                    intake.begin(base)
            intake.session.close()
        except TruncatedError:
            if not partial or not intake.segments:
                raise
            return intake.hold()
        if intake.held is None:  # pragma: no cover - a complete session has restored its segment
            raise CodecError("the transfer is complete but nothing was restored")
        return intake.held

    def read_file(self, source: BinaryIO, *, partial: bool = False, base: Held | None = None) -> Held:
        """Take a transfer from a `.kvl` file; `partial`: also from one that was cut; `base`: as in `receive`."""
        return self.receive(read_frames(source), partial=partial, base=base)

    def join(self, *held: Held) -> Held:
        """Refused by name: contexts that were read apart cannot become one. Raises ContextError."""
        join(*(one.cache for one in held))

    def answer(self, held: Held, question: str, **options: float) -> Answer:
        """Answer from a held context. Options as in `model.generate.generate`."""
        return answer(self._asking(held), held.cache, question, **options)

    def generate(self, held: Held, question: str, **options: float) -> Iterator[Step]:
        """Answer a token at a time; several at once over one context are fine."""
        return generate(self._asking(held), held.cache, question, **options)  # type: ignore[arg-type]

    def to_dynamic_cache(self, held: Held) -> DynamicCache:
        """The whole context as a transformers cache. Raises ContextError where positions are missing."""
        return to_dynamic_cache(self.lm, held.cache)

    def generate_inputs(self, held: Held, question: str, beams: int = 1) -> GenerateInputs:
        """What `receiver.lm.model.generate(**inputs)` needs to answer from a held context, whole or not.

        See `model.exchange.generate_inputs`.
        """
        return generate_inputs(self._asking(held), held.cache, question, beams)

    def _asking(self, held: Held) -> LanguageModel:
        """The model, with the template by which a question goes on from a context."""
        return self.lm.asking(held.template_id) if held.template_id else self.lm
