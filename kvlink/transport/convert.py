"""Service messages and the package's values, pair by pair.

Does not know: sockets, agents. Place on the path: just inside the services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from kvlink.errors import ConfigError, RemoteProtocolError
from kvlink.receipt import Capabilities, Certificate, Receipt, Spoken
from kvlink.recipe import Target
from kvlink.texts import whole
from kvlink.transport.address import check_advertised
from kvlink.transport.api import Explanation, Fetch, PushState, PushStatus
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2, wire_pb2
from kvlink.wire import mapping
from kvlink.wire.messages import (
    fingerprint_from_proto,
    fingerprint_to_proto,
    sketch_from_proto,
    sketch_to_proto,
)

M = TypeVar("M", bound=Message)

_MODE, _CODER, _DTYPE = (wire_pb2.DESCRIPTOR.enum_types_by_name[name] for name in ("Mode", "Coder", "Dtype"))

_STATES: dict[PushState, receiver_pb2.TransferState] = {
    "accepted": receiver_pb2.TRANSFER_STATE_ACCEPTED,
    "durable": receiver_pb2.TRANSFER_STATE_DURABLE,
    "complete": receiver_pb2.TRANSFER_STATE_COMPLETE,
    "enough": receiver_pb2.TRANSFER_STATE_ENOUGH,
    "failed": receiver_pb2.TRANSFER_STATE_FAILED,
    "cancelled": receiver_pb2.TRANSFER_STATE_CANCELLED,
}
_STATE_NAMES = {value: name for name, value in _STATES.items()}


def request(kind: Callable[..., M], **fields: Any) -> M:
    """A message of these fields. Raises ContextError or ConfigError for one that no message can hold: half a
    character in a text, a number out of its range."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        for name, value in fields.items():
            what = f"the {name.replace('_', ' ')}"
            if isinstance(value, str):
                whole(value, what)
            try:
                kind(**{name: value})
            except (ValueError, TypeError) as why:
                raise ConfigError(f"{what} cannot be sent: {why}") from error
        raise ConfigError(f"a request cannot be sent: {error}") from error


def target_to_proto(target: Target) -> common_pb2.Target:
    """Raises ConfigError for one that no message can hold."""
    return request(common_pb2.Target, **{field.name: getattr(target, field.name) for field in fields(Target)})


def target_from_proto(message: common_pb2.Target) -> Target:
    """Raises RecipeError where it asks for what cannot be."""
    return cast(Target, mapping.read(message, Target))


def fetch_to_proto(fetch: Fetch) -> sender_pb2.FetchCacheRequest:
    """Raises ContextError, ConfigError for one that no message can hold."""
    return request(
        sender_pb2.FetchCacheRequest,
        **{
            **{f.name: getattr(fetch, f.name) for f in fields(fetch)},
            "target": target_to_proto(fetch.target),
        },
    )


def receipt_to_proto(receipt: Receipt) -> common_pb2.Receipt:
    return common_pb2.Receipt(
        stage_s=receipt.stage_s,
        bytes=receipt.bytes,
        wire_bytes=receipt.wire_bytes,
        socket_bytes=receipt.socket_bytes,
        bits_per_element=receipt.bits_per_element,
        context_tokens=receipt.context_tokens,
        kept_tokens=receipt.kept_tokens,
        kept_share=receipt.kept_share,
        cache_digest=receipt.cache_digest,
        recipe=receipt.recipe,
        transfer_id=receipt.transfer_id,
        element_count=receipt.element_count,
        segments=receipt.segments,
        certificate=_certificate_to_proto(receipt.certificate),
    )


def receipt_from_proto(message: common_pb2.Receipt) -> Receipt:
    if message.kept_tokens > message.context_tokens:
        raise RemoteProtocolError(
            f"a receipt of {message.context_tokens} context tokens names {message.kept_tokens} kept ones"
        )
    return Receipt(
        transfer_id=message.transfer_id,
        recipe=message.recipe,
        context_tokens=message.context_tokens,
        kept_tokens=message.kept_tokens,
        kept_share=message.kept_share,
        cache_digest=message.cache_digest,
        element_count=message.element_count,
        segments=message.segments,
        stage_s=dict(message.stage_s),
        bytes=dict(message.bytes),
        socket_bytes=message.socket_bytes,
        certificate=_certificate_from_proto(message) if message.HasField("certificate") else None,
    )


_CERTIFICATE = ("agreeing_tokens", "tokens", "kl_mean", "logit_error", "escalations", "seconds")


_FARTHEST = 1e9
_SAID = "GetCapabilitiesResponse.capabilities"


def _certificate_to_proto(value: Certificate | None) -> common_pb2.Certificate | None:
    if value is None:
        return None
    told = {name: getattr(value, name) for name in _CERTIFICATE}
    for name in ("kl_mean", "logit_error"):  # distances: what cannot be computed is as far as any
        told[name] = told[name] if told[name] <= _FARTHEST else _FARTHEST
    return common_pb2.Certificate(**told)


def _certificate_from_proto(message: common_pb2.Receipt) -> Certificate:
    found = Certificate(**{name: getattr(message.certificate, name) for name in _CERTIFICATE})
    if found.agreeing_tokens > found.tokens:
        raise RemoteProtocolError(f"{found.agreeing_tokens} of {found.tokens} tokens agree")
    return found


def explanation_to_proto(value: Explanation) -> sender_pb2.Explanation:
    return sender_pb2.Explanation(tokens=value.tokens, need=value.need, kept=value.kept)


def explanation_from_proto(message: sender_pb2.Explanation) -> Explanation:
    """Raises RemoteProtocolError where the three lists differ in length."""
    found = Explanation(tuple(message.tokens), tuple(message.need), tuple(message.kept))
    if not len(found.tokens) == len(found.need) == len(found.kept):
        raise RemoteProtocolError(
            f"an explanation of {len(found.tokens)} tokens has {len(found.need)} needs and {len(found.kept)} shares"
        )
    return found


def capabilities_to_proto(value: Capabilities) -> common_pb2.Capabilities:
    return common_pb2.Capabilities(
        protocol_min=value.spoken.protocol_min,
        protocol_max=value.spoken.protocol_max,
        model_name=value.model_name,
        fingerprint=fingerprint_to_proto(value.fingerprint),
        sketch=sketch_to_proto(value.sketch),
        modes=[mapping.number(_MODE, mode) for mode in value.spoken.modes],  # type: ignore[misc]
        codecs=value.spoken.codecs,
        coders=[mapping.number(_CODER, coder) for coder in value.spoken.coders],  # type: ignore[misc]
        limits=common_pb2.Limits(**value.limits),
        prefill_tokens_per_s=value.prefill_tokens_per_s,
        release=value.release,
        dtype=mapping.number(_DTYPE, value.dtype),  # type: ignore[arg-type]
        profiles=value.profiles,
        address=value.address,
    )


def capabilities_from_proto(message: common_pb2.Capabilities) -> Capabilities:
    """Raises RemoteProtocolError where it calls itself by what is no address, or computes in no known dtype."""
    return Capabilities(
        model_name=message.model_name,
        fingerprint=fingerprint_from_proto(message.fingerprint),
        sketch=sketch_from_proto(message),
        dtype=_dtype(message.dtype),
        release=message.release,
        spoken=Spoken(
            message.protocol_min,
            message.protocol_max,
            _known(_MODE, message.modes),
            tuple(message.codecs),
            _known(_CODER, message.coders),
        ),
        limits={field.name: value for field, value in message.limits.ListFields()},
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        profiles=tuple(message.profiles),
        address=_advertised(message.address),
    )


def _known(enum: Any, numbers: Iterable[int]) -> tuple[str, ...]:
    """The words of those that this release knows: a later one may speak more."""
    return tuple(mapping.word(enum, number) for number in numbers if number in enum.values_by_number)


def _advertised(text: str) -> str:
    try:
        return check_advertised(text)
    except ConfigError as error:
        raise RemoteProtocolError(f"{_SAID}.address: {error}") from None


def _dtype(number: int) -> str:
    try:
        return mapping.word(_DTYPE, number)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{_SAID}.dtype: {error}") from None


def push_status_to_proto(status: PushStatus) -> receiver_pb2.PushCacheResponse:
    return receiver_pb2.PushCacheResponse(
        state=_STATES[status.state],
        next_sequence=status.next_sequence,
        cache_id=status.cache_id,
        receipt=receipt_to_proto(status.receipt),
    )


def push_status_from_proto(
    message: receiver_pb2.PushCacheResponse | receiver_pb2.GetTransferStatusResponse,
) -> PushStatus:
    receipt, why = Receipt(), ""
    if isinstance(message, receiver_pb2.PushCacheResponse):
        receipt = receipt_from_proto(message.receipt)
    else:
        why = message.why
    state = _STATE_NAMES.get(message.state)
    if state is None:
        raise RemoteProtocolError("a status without a state")
    return PushStatus(state, message.next_sequence, message.cache_id, receipt, why)
