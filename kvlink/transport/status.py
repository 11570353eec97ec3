"""Errors of the package and gRPC status codes: one table, both directions.

A test fails on an error class that the table does not place.

Does not know: what was being done. Place on the path: at the edge of every call.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvlink import errors
from kvlink.errors import KvlinkError
from kvlink.quoting import shown

CODES: dict[type[KvlinkError], grpc.StatusCode] = {
    errors.KvlinkError: grpc.StatusCode.INTERNAL,
    errors.InputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RecipeError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedCacheError: grpc.StatusCode.UNIMPLEMENTED,
    errors.IdentityError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DataError: grpc.StatusCode.DATA_LOSS,
    errors.IntegrityError: grpc.StatusCode.DATA_LOSS,
    errors.TruncatedError: grpc.StatusCode.DATA_LOSS,
    errors.CodecError: grpc.StatusCode.DATA_LOSS,
    errors.ProtocolError: grpc.StatusCode.INTERNAL,
    errors.LocalProtocolError: grpc.StatusCode.INTERNAL,
    errors.RemoteProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.CredentialsError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TransportError: grpc.StatusCode.UNAVAILABLE,
    errors.PeerUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StoppingError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
}

_DOMAIN = "kvlink"
_MESSAGE_BYTES = 1500
"""Of a message in a status. It travels twice, once percent-encoded, in metadata of 8 kB at most."""
_MOST_RETRY_S = 3600.0
"""No peer makes another wait longer than this."""

_BY_NAME = {cls.__name__: cls for cls in CODES}
_FALLBACK: dict[grpc.StatusCode, type[KvlinkError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.PeerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.PeerUnavailableError,
    # Our agents say more than a bare INTERNAL: this one is gRPC's own, for a broken connection.
    grpc.StatusCode.INTERNAL: errors.PeerUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.UNIMPLEMENTED: errors.RemoteProtocolError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessError,
    grpc.StatusCode.UNAUTHENTICATED: errors.CredentialsError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InputError,
}


def to_status(error: KvlinkError) -> grpc.Status:
    """The rich status of an error: code, message, class name as the reason, when to try again."""
    code = CODES[type(error)]
    proto = status_pb2.Status(code=code.value[0], message=_message(error))
    proto.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=type(error).__name__,
            domain=_DOMAIN,
            metadata={"retryable": str(error.retryable).lower()},
        )
    )
    if error.retry_after_s:
        hint = error_details_pb2.RetryInfo()
        hint.retry_delay.FromMilliseconds(round(1000 * error.retry_after_s))
        proto.details.add().Pack(hint)
    return rpc_status.to_status(proto)


def _message(error: KvlinkError) -> str:
    """The error's message, cut where its letters take too many bytes."""
    text = str(error)
    most = _MESSAGE_BYTES
    while len(text.encode()) > _MESSAGE_BYTES:
        most = most * 3 // 4
        text = shown(error, most)
    return text


def _details_of(error: grpc.RpcError) -> status_pb2.Status:
    """The rich status that came with an error; an empty one where there is none, or it is not what it says."""
    try:
        return rpc_status.from_call(error) or status_pb2.Status()
    except (ValueError, DecodeError):  # another code or message than the call's own; no such message at all
        return status_pb2.Status()


def from_rpc_error(error: grpc.RpcError, peer: str) -> KvlinkError:
    """The error that the peer raised, or the nearest one for what gRPC itself reports."""
    proto = _details_of(error)
    found: KvlinkError | None = None
    info, hint = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in proto.details:
        if detail.Unpack(info) and info.domain == _DOMAIN and info.reason in _BY_NAME:
            found = _BY_NAME[info.reason](f"{peer}: {proto.message}")
            found.reported = True
        elif detail.Unpack(hint) and found is not None:
            found.retry_after_s = min(max(0.0, hint.retry_delay.ToMilliseconds() / 1000), _MOST_RETRY_S)
    if found is not None:
        return found
    code, text = error.code(), error.details() or "no details"
    return _FALLBACK.get(code, errors.RemoteProtocolError)(f"{peer}: {code.name.lower()}: {text}")
