"""An agent that answers what a test wants it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from kvlink.v1 import receiver_pb2, sender_pb2

RECEIVER = receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"]
SENDER = sender_pb2.DESCRIPTOR.services_by_name["SenderService"]


async def serve(
    answers: Callable[[str, Any], AsyncIterator[bytes]], service: Any = RECEIVER
) -> tuple[grpc.aio.Server, int]:
    """An agent whose every method answers `answers(method, context)`, and its port."""
    server = grpc.aio.server()

    def handler(name: str) -> Any:
        async def answer(requests: Any, context: Any) -> AsyncIterator[bytes]:
            async for message in answers(name, context):
                yield message

        return grpc.stream_stream_rpc_method_handler(answer, None, None)

    handlers = {method.name: handler(method.name) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port
