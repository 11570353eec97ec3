"""A receiver that answers what a test wants it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from kvlink.v1 import receiver_pb2


async def serve(answers: Callable[[str, Any], AsyncIterator[bytes]]) -> tuple[grpc.aio.Server, int]:
    """A receiver whose every method answers `answers(method, context)`, and its port."""
    service = receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"]
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
