"""Errors cross gRPC and come out as what they were."""

from __future__ import annotations

import inspect

import grpc
import pytest

from kvlink import errors
from kvlink.transport.status import CODES, from_rpc_error, to_status

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.KvlinkError)]


class Call(grpc.RpcError):
    """What a client gets, made from a status."""

    def __init__(self, code, details, trailing=()):
        self._status = (code, details, trailing)

    def code(self):
        return self._status[0]

    def details(self):
        return self._status[1]

    def trailing_metadata(self):
        return self._status[2]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_a_code_and_comes_back_as_itself(cls):
    assert cls in CODES
    status = to_status(cls("layer 3 key, frame 41"))
    assert status.code == CODES[cls]
    back = from_rpc_error(Call(status.code, status.details, status.trailing_metadata), "peer:1")
    assert type(back) is cls
    assert "layer 3 key, frame 41" in str(back)
    assert "peer:1" in str(back)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.PeerUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.INTERNAL, errors.PeerUnavailableError),
        (grpc.StatusCode.UNKNOWN, errors.RemoteProtocolError),
    ],
)
def test_what_grpc_itself_reports_becomes_the_nearest_error(code, cls):
    assert type(from_rpc_error(Call(code, "text"), "peer:1")) is cls
