"""A peer that answers anything: random well-formed answers to every call of both services, and any ending.

Its capabilities are mostly a real agent's: otherwise nobody would say more to it than hello.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvlink.errors import KvlinkError
from kvlink.transport.api import Ask, Delivery, Fetch
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.credentials import Credentials
from kvlink.transport.status import CODES
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.fuzz.messages import Maker, Seen
from tests.fuzz.transfers import almost_honest

_ENDS = list(grpc.StatusCode)
_NAMES = [cls.__name__ for cls in CODES] + ["Nothing", ""]
_PUSH, _GENERATE, _DELIVER = (
    receiver_pb2.PushCacheResponse,
    receiver_pb2.GenerateResponse,
    sender_pb2.DeliverCacheResponse,
)
HONEST: dict[str, list[list[Any]]] = {
    "PushCache": [
        [_PUSH(state=1), _PUSH(state=2, next_sequence=2), _PUSH(state=3, next_sequence=5, cache_id="c" * 22)],
        [_PUSH(state=1, next_sequence=3), _PUSH(state=3, next_sequence=5, cache_id="c" * 22)],
        [_PUSH(state=3, next_sequence=5, cache_id="c" * 22)],
    ],
    "Generate": [[_GENERATE(text="Tavik", token_ids=[7]), _GENERATE(done=True)]],
    "DeliverCache": [
        [
            _DELIVER(sent_bytes=0, total_bytes=900),
            _DELIVER(sent_bytes=900, total_bytes=900, done=True, cache_id="c" * 22),
        ]
    ],
}
"""Answers of honest agents, to begin from."""


class Liar:
    """A server for both services. `seed`: of what it answers."""

    def __init__(
        self,
        seed: int,
        capabilities: common_pb2.GetCapabilitiesResponse,
        transfers: Sequence[Sequence[bytes]] = (),
    ) -> None:
        self._rng = random.Random(seed)
        self._maker = Maker(self._rng, Seen())
        self._capabilities, self._transfers = capabilities, transfers
        self.answered: Counter[str] = Counter()
        self._server = grpc.aio.server()
        for service in (
            receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"],
            sender_pb2.DESCRIPTOR.services_by_name["SenderService"],
        ):
            handlers = {method.name: self._handler(method) for method in service.methods}
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service.full_name, handlers),)
            )

    async def start(self, address: str = "127.0.0.1:0", credentials: Credentials | None = None) -> int:
        """Listen; the port."""
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials.server())
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        await self._server.stop(0)

    def _handler(self, method: MethodDescriptor) -> Any:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            rng = self._rng
            self.answered[method.name] += 1
            if rng.random() < 0.9:
                await anext(aiter(requests), b"")
            for message in self._answers(method):
                yield message
                if rng.random() < 0.3:
                    await asyncio.sleep(0.001)
            if rng.random() < 0.4:
                await self._end(context)

        return grpc.stream_stream_rpc_method_handler(answer, None, None)

    def _answers(self, method: MethodDescriptor) -> list[bytes]:
        rng, maker, name = self._rng, self._maker, method.name
        if name == "GetCapabilities":
            honest = rng.random() < 0.8
            return [(self._capabilities if honest else maker.changed(self._capabilities)).SerializeToString()]
        if rng.random() < 0.02:
            return [rng.randbytes(20)]
        if name == "FetchCache" and self._transfers and rng.random() < 0.8:
            frames = almost_honest(self._transfers, maker)
            told = [sender_pb2.FetchCacheResponse(frame=frame) for frame in frames]
            for _ in range(rng.choice((0, 0, 2))):
                beat = sender_pb2.FetchCacheResponse(heartbeat=common_pb2.Heartbeat())
                told.insert(rng.randint(0, len(told)), beat)
            return [one.SerializeToString() for one in told]
        if name in HONEST and rng.random() < 0.7:
            return [
                (maker.changed(one) if rng.random() < 0.6 else one).SerializeToString()
                for one in rng.choice(HONEST[name])
            ]
        count = rng.randint(0, 4) if method.server_streaming else 1
        return [maker.message(method.output_type).SerializeToString() for _ in range(count)]

    async def _end(self, context: Any) -> None:
        """Any status, half of them with details as our own agents send them."""
        rng = self._rng
        code = rng.choice(_ENDS)
        text = self._maker.value(common_pb2.Receipt.DESCRIPTOR.fields_by_name["recipe"])[:3000]
        if rng.random() < 0.5 or code is grpc.StatusCode.OK:
            await context.abort(code if code is not grpc.StatusCode.OK else grpc.StatusCode.ABORTED, text)
        proto = status_pb2.Status(code=code.value[0], message=text[:500])
        info = error_details_pb2.ErrorInfo(reason=rng.choice(_NAMES), domain=rng.choice(("kvlink", "", "x")))
        proto.details.add().Pack(info)
        if rng.random() < 0.5:
            hint = error_details_pb2.RetryInfo()
            hint.retry_delay.seconds = rng.choice((0, 1, -1, 2**40, -(2**40)))
            proto.details.add().Pack(hint)
        await context.abort_with_status(rpc_status.to_status(proto))


async def fuzz_clients(address: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Every call of both clients to a liar, `count` in all: how they ended, and what was no error of ours."""
    rng, ends, faults = random.Random(seed), Counter[str](), []

    async def drain(items: AsyncIterator[Any]) -> None:
        async for _ in items:
            pass

    async with ReceiverClient(address) as target, SenderClient(address) as source:
        calls = {
            "push": lambda: drain(target.push([b"frame"] * 3)),
            "generate": lambda: drain(target.generate(Ask("c", "Where?"))),
            "put_profile": lambda: target.put_profile(b"x"),
            "transfer_status": lambda: target.transfer_status(b"t" * 16),
            "delete_cache": lambda: target.delete_cache("c"),
            "cancel": lambda: target.cancel(b"t" * 16),
            "capabilities": lambda: rng.choice((target, source)).capabilities(),
            "publish": lambda: source.publish("text"),
            "unpublish": lambda: source.unpublish("c"),
            "fetch": lambda: drain(source.fetch(Fetch("c", "Where?", "int8"))),
            "deliver": lambda: drain(source.deliver(Delivery("127.0.0.1:9", "Where?", "int8", text="text"))),
        }
        for number in range(count):
            name = rng.choice(list(calls))
            try:
                await asyncio.wait_for(calls[name](), 60)
                ends[f"{name}: answered"] += 1
            except KvlinkError as error:
                ends[f"{name}: {type(error).__name__}"] += 1
            except Exception as error:
                faults.append(f"call {number}, {name}: {type(error).__name__}: {error}"[:500])
    return ends, faults
