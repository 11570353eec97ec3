"""A peer that says what a test wants: raw answers on a real port, past everything that an honest agent checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvlink.payload import Fingerprint
from kvlink.receipt import Capabilities
from kvlink.transport import convert
from kvlink.transport.credentials import Credentials
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2

Method = Callable[[Any, grpc.ServicerContext], Any]
_REQUESTS = {
    "GetCapabilities": common_pb2.GetCapabilitiesRequest,
    "PublishContext": sender_pb2.PublishContextRequest,
    "DeliverCache": sender_pb2.DeliverCacheRequest,
    "FetchCache": sender_pb2.FetchCacheRequest,
    "Generate": receiver_pb2.GenerateRequest,
    "DeleteCache": receiver_pb2.DeleteCacheRequest,
    "PushCache": receiver_pb2.PushCacheRequest,
}


def capabilities(**changed: Any) -> common_pb2.GetCapabilitiesResponse:
    """What some agent says of itself, with other values in some fields."""
    honest = Capabilities("a-model", Fingerprint(*[b"\1" * 16] * 5), "float32", "0.1.0")
    told = convert.capabilities_to_proto(honest)
    for name, value in changed.items():
        setattr(told, name, value)
    return common_pb2.GetCapabilitiesResponse(capabilities=told)


@contextmanager
def lying(
    *, address: str = "127.0.0.1:0", credentials: Credentials | None = None, **methods: Method
) -> Iterator[str]:
    """The address of a sender and receiver that answers by these functions; generators make streams."""
    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {}
    for name, function in methods.items():
        asked = "stream" if name == "PushCache" else "unary"
        answered = "stream" if inspect.isgeneratorfunction(function) else "unary"
        make = getattr(grpc, f"{asked}_{answered}_rpc_method_handler")
        handlers[name] = make(
            function, _REQUESTS[name].FromString, lambda message: message.SerializeToString()
        )
    for service in ("SenderService", "ReceiverService"):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"kvlink.v1.{service}", handlers),)
        )
    serving = health.HealthServicer()
    serving.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials.server())
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)
