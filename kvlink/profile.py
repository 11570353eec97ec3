"""Profiles: what is known of a model's caches before any message, shared by both ends.

A profile holds, for keys and for values of each layer, the mean, a basis in which the coefficients
are nearly independent, and their spread. Coefficients are in units of what the model tolerates, so
that one step fits all. Keys are meant without their rotation. A profile belongs to one model: it
carries its fingerprint.

Source: transform coding with a Karhunen–Loève basis; `docs/codec.md` has the formulas.
Does not know: how statistics are gathered, how coefficients are coded.
Place on the path: ground floor; the sender encodes with it, the receiver decodes with the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor

from kvlink.codecs import STEP_CODES
from kvlink.errors import CodecError, IdentityError, IntegrityError
from kvlink.payload import Fingerprint

FORMAT = "kvlink-profile/1"
MAX_BYTES = 512_000_000
MEMORY_PER_BYTE = 6
"""Bytes in memory for each of a file's: a basis is two there, four here and eight in its inverse."""
_CODE_LIMIT = 127
_HEADER_BYTES = 500_000
"""Of JSON that is read before anything is known of it: 6 tensors of about 90 bytes for each of 900 layers."""


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer. Channels C = Hkv · D; a basis has B blocks of C ÷ B channels.

    `mean` `[C]` float32. `synthesis` `[B, C/B, C/B]` float32, FP16 numbers: channels of a block from
    its coefficients. `spread` `[C]` int64: 4 · log2 of each coefficient's standard deviation.
    """

    mean: Tensor
    synthesis: Tensor
    spread: Tensor

    @cached_property
    def analysis(self) -> Tensor:
        """`[B, C/B, C/B]` float64: coefficients from channels, the inverse of the synthesis."""
        return torch.linalg.inv(self.synthesis.double())


@dataclass(frozen=True)
class Profile:
    """The sides of all layers, whose they are, and how they came about."""

    fingerprint: Fingerprint
    keys: tuple[Side, ...]
    values: tuple[Side, ...]
    about: dict[str, str]
    quality: tuple[tuple[int, float], ...] = ()
    """Share of answers that stayed the same on held-out texts, by 4 · log2 of the step."""

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name the profile: BLAKE3 of its file."""
        return blake3(self.to_bytes()).digest(length=16)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of its file."""
        return len(self.to_bytes())

    def side(self, layer: int, side: str) -> Side:
        return (self.keys if side == "keys" else self.values)[layer]

    def to_bytes(self) -> bytes:
        """The file: safetensors, the same bytes for the same profile, with a checksum of itself."""
        return self._file(blake3(self._file("")).hexdigest())

    def _file(self, checksum: str) -> bytes:
        tensors: dict[str, Tensor] = {}
        for name, sides in (("keys", self.keys), ("values", self.values)):
            for layer, side in enumerate(sides):
                tensors[f"{layer}.{name}.mean"] = side.mean.to(torch.float32).contiguous()
                tensors[f"{layer}.{name}.synthesis"] = side.synthesis.to(torch.float16).contiguous()
                tensors[f"{layer}.{name}.spread"] = side.spread.to(torch.int8).contiguous()
        told = {
            "format": FORMAT,
            "layers": str(len(self.keys)),
            "fingerprint": json.dumps({k: v.hex() for k, v in asdict(self.fingerprint).items()}),
            "about": json.dumps(self.about, sort_keys=True),
            "quality": json.dumps(self.quality),
            "checksum": checksum,
        }
        # One entry: safetensors keeps several in no particular order.
        packed = {"kvlink": json.dumps(told, sort_keys=True)}
        return bytes(safetensors.torch.save(tensors, packed))

    @classmethod
    def from_bytes(cls, data: bytes) -> Profile:
        """Read a file. Raises CodecError where it is no profile or its parts do not fit together,
        IntegrityError where its checksum does not match."""
        if len(data) > MAX_BYTES:
            raise CodecError(f"a profile has at most {MAX_BYTES} bytes, found {len(data)}")
        try:
            told = json.loads(_metadata(data)["kvlink"])
            if told["format"] != FORMAT:
                raise CodecError(f"profile: expected format {FORMAT}, found {told['format']!r}")
            marks = {
                f.name: bytes.fromhex(json.loads(told["fingerprint"])[f.name]) for f in fields(Fingerprint)
            }
            about = {str(k): str(v) for k, v in json.loads(told["about"]).items()}
            quality = tuple(_step_quality(*pair) for pair in json.loads(told["quality"]))
            layers = int(told["layers"])
            tensors = safetensors.torch.load(data)
            if layers < 1 or len(tensors) != 6 * layers:
                raise CodecError(
                    f"profile: expected {6 * layers} tensors for {layers} layers, found {len(tensors)}"
                )
            sides = {
                name: tuple(_side(tensors, f"{layer}.{name}") for layer in range(layers))
                for name in ("keys", "values")
            }
        except (
            SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError
        ) as error:  # fmt: skip
            raise CodecError(f"not a profile: {type(error).__name__}: {error}") from error
        sizes = {side.mean.shape for both in sides.values() for side in both}
        if len(sizes) != 1:
            raise CodecError(f"profile: layers differ in channels: {sorted(tuple(s) for s in sizes)}")
        found = cls(Fingerprint(**marks), sides["keys"], sides["values"], about, quality)
        if found.to_bytes() != data:
            raise IntegrityError("profile: its checksum does not match what it holds")
        return found

    def require_match(self, fingerprint: Fingerprint) -> None:
        """Raise IdentityError, naming the component, where the profile is another model's.

        Tokenizer and template have no part in it: a cache is a cache whatever the prompt.
        """
        for name in ("weights", "architecture", "rotary"):
            mine, theirs = getattr(self.fingerprint, name), getattr(fingerprint, name)
            if mine != theirs:
                raise IdentityError(
                    f"the profile is another model's: {name} {mine.hex()[:12]}, the model's {theirs.hex()[:12]}"
                )


def _step_quality(code: Any, share: Any) -> tuple[int, float]:
    """A step's code and its share of answers. Raises CodecError where one is none."""
    if not isinstance(code, int) or not STEP_CODES[0] <= code <= STEP_CODES[1]:
        raise CodecError(
            f"profile: expected a step's code from {STEP_CODES[0]} to {STEP_CODES[1]}, found {code!r}"
        )
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise CodecError(f"profile: expected a share of answers from 0 to 1, found {share!r}")
    return code, float(share)


def _metadata(data: bytes) -> dict[str, Any]:
    """The header's metadata; safetensors hands it out only for files."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(len(data) - 8, _HEADER_BYTES):
        raise CodecError("not a profile: its header does not fit the file")
    found = json.loads(data[8 : 8 + size])["__metadata__"]
    return dict(found)


def _side(tensors: dict[str, Tensor], name: str) -> Side:
    mean, synthesis, spread = (tensors[f"{name}.{part}"] for part in ("mean", "synthesis", "spread"))
    channels = mean.numel()
    blocks = synthesis.shape[0] if synthesis.ndim == 3 else 0
    expected = (blocks, channels // max(1, blocks), channels // max(1, blocks))
    if (
        mean.ndim != 1
        or not channels
        or not blocks
        or tuple(synthesis.shape) != expected
        or blocks * expected[1] != channels
    ):
        raise CodecError(
            f"profile {name}: a mean of {tuple(mean.shape)} does not fit a basis of {tuple(synthesis.shape)}"
        )
    if tuple(spread.shape) != (channels,) or spread.dtype != torch.int8:
        raise CodecError(
            f"profile {name}: expected {channels} spreads of one byte, found {tuple(spread.shape)}"
        )
    if mean.dtype != torch.float32 or synthesis.dtype != torch.float16:
        raise CodecError(
            f"profile {name}: expected float32 and float16, found {mean.dtype} and {synthesis.dtype}"
        )
    if not bool(mean.isfinite().all()) or not bool(synthesis.isfinite().all()):
        raise CodecError(f"profile {name}: a number is not finite")
    return Side(mean, synthesis.float(), spread.long())


def make_side(mean: Tensor, blocks: Sequence[Tensor], spread: Tensor) -> Side:
    """A side with its numbers as the file keeps them. `spread`: standard deviations, in steps of 1."""
    synthesis = torch.stack(list(blocks)).to(torch.float16).float()
    return Side(mean.to(torch.float32), synthesis, octave_codes(spread.double().clamp(min=1e-9)))


def octave_codes(sizes: Tensor) -> Tensor:
    """4 · log2 of positive sizes as whole numbers that fit into a byte, int64."""
    return (4 * sizes.log2()).round().clamp(-_CODE_LIMIT, _CODE_LIMIT).long()
