"""Calls to one service: planned from a seed and a number, made on a bare connection, and how they ended.

Every method is called as a stream both ways, whatever it is: gRPC's wire is the same, and so a call may bring
no message, or two where one is expected, or bytes that are no message.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from kvlink.v1 import receiver_pb2, wire_pb2
from tests.fuzz.agents import LEAST
from tests.fuzz.honest import Honest
from tests.fuzz.messages import Maker, Seen
from tests.fuzz.transfers import almost_honest

HANG_S = 60.0
"""A call that brings nothing for so long hangs: no answer, no sign of life."""
_CALL_S = 900.0
LOST = "LOST"
"""What our own gRPC makes of a call that ends while it writes: the agent's status is not to be had, its log is."""
FAULTS = ("INTERNAL", "UNKNOWN", "HANG")
"""Statuses that no message may lead to."""

Ending = Literal["to its end", "cancelled", "left open", "short deadline"]
_WEIGHTS = {"GetCapabilities": 0.3, "PutProfile": 0.3, "PublishContext": 0.7, "DeliverCache": 0.7}
_IDS = ("context_id", "cache_id", "transfer_id", "delivery_id")


@dataclass(frozen=True, slots=True)
class Plan:
    """One call: what is sent, and when it is given up."""

    number: int
    method: MethodDescriptor
    peer: str
    messages: list[bytes]
    metadata: list[tuple[str, str]]
    ending: Ending = "to its end"
    malformed: bool = False
    after_s: float = 0.0
    """Seconds after which a call that is not taken to its end is given up."""
    paced: bool = False
    """Whether the second message waits for the first answer."""


@dataclass(slots=True)
class Ended:
    """How a call ended. `sent`: messages that left."""

    status: str = ""
    details: str = ""
    sent: int = 0
    seconds: float = 0.0
    answers: int = 0
    last: bytes = b""


@dataclass(slots=True)
class Planner:
    """What to call next: the same for the same seed and number, but for ids that agents choose."""

    service: ServiceDescriptor
    seed: int
    honest: Honest
    seen: Seen
    receiver_at: str
    samples: dict[str, list[Any]] = field(init=False)
    own: dict[str, Seen] = field(init=False)
    """Ids by the peer that they belong to."""
    begun: dict[str, deque[tuple[list[bytes], int]]] = field(init=False)
    """Transfers that were cut, by peer: their frames, and how many of them left."""

    def __post_init__(self) -> None:
        self.samples = self.honest.requests(self.receiver_at)
        self.own = defaultdict(lambda: Seen(6))
        self.begun = defaultdict(lambda: deque(maxlen=6))

    def plan(self, number: int, peer: str, token: str) -> Plan:
        rng = random.Random(f"{self.seed}/{self.service.name}/{number}")
        methods = list(self.service.methods)
        (method,) = rng.choices(methods, [_WEIGHTS.get(one.name, 1.0) for one in methods])
        maker = Maker(rng, self.seen)
        malformed = rng.random() < 0.01
        if malformed:
            messages = [rng.randbytes(rng.choice((1, 7, 100))) for _ in range(rng.choice((1, 1, 3)))]
        elif method.client_streaming:
            messages = self._stream(maker, method, peer)
        else:
            messages = [self._request(maker, method, self.own[peer]).SerializeToString()]
            if rng.random() < 0.01:
                messages = messages * rng.choice((0, 2, 3))
        ending: Ending = rng.choices(
            ("to its end", "cancelled", "left open", "short deadline"), (0.93, 0.03, 0.01, 0.03)
        )[0]
        if not messages:
            ending = "cancelled"  # gRPC itself waits for the message that a unary call is about
        after_s = 10 ** rng.uniform(-3.5, -0.5)
        return Plan(
            number, method, peer, messages, self._metadata(rng, token), ending, malformed, after_s,
            paced=method.client_streaming and method.server_streaming and rng.random() < 0.7,
        )  # fmt: skip

    def _request(self, maker: Maker, method: MethodDescriptor, own: Seen) -> Any:
        rng, samples = maker.rng, self.samples.get(method.name)
        if not samples or rng.random() < 0.35:
            return maker.message(method.input_type)
        made = type(samples[0])()
        made.CopyFrom(rng.choice(samples))
        for name in _IDS:  # its own ids, which are there, and now and then new ones
            if name in made.DESCRIPTOR.fields_by_name and getattr(made, name):
                kind = type(getattr(made, name))
                known = kind is str or rng.random() < 0.5
                value = (
                    (own.pick(rng, name, kind) or self.seen.pick(rng, name, kind))
                    if known
                    else rng.randbytes(16)
                )
                setattr(made, name, value or kind())
        return made if rng.random() < 0.15 else maker.changed(made)

    def _stream(self, maker: Maker, method: MethodDescriptor, peer: str) -> list[bytes]:
        """Messages of a stream: an almost honest transfer, one that goes on or comes again, or random ones."""
        if method.name == "PutProfile" and maker.rng.random() < 0.7:
            return [self._slip(maker, message) for message in self.samples[method.name]]
        if method.name != "PushCache" or maker.rng.random() < 0.1:
            return [
                maker.message(method.input_type).SerializeToString() for _ in range(maker.rng.randint(0, 4))
            ]
        return [
            receiver_pb2.PushCacheRequest(frame=frame).SerializeToString()
            for frame in self._frames(maker, peer)
        ]

    @staticmethod
    def _slip(maker: Maker, message: Any) -> bytes:
        """A message of a stream, seldom with a slip in it."""
        made = type(message)()
        made.CopyFrom(message)
        return (maker.changed(made) if maker.rng.random() < 0.1 else made).SerializeToString()

    def _frames(self, maker: Maker, peer: str) -> list[bytes]:
        rng = maker.rng
        begun = self.begun[peer]
        if begun and rng.random() < 0.2:
            frames, after = rng.choice(begun)
            return [frames[0], *frames[rng.choice((1, after, after, rng.randint(1, len(frames)))) :]]
        if rng.random() < 0.05:
            return [
                maker.message(wire_pb2.Frame.DESCRIPTOR).SerializeToString() for _ in range(rng.randint(0, 4))
            ]
        frames = almost_honest(self.honest.transfers, maker)
        if len(frames) > 2 and rng.random() < 0.2:
            after = rng.randint(1, len(frames) - 1)
            begun.append((frames, after))
            return frames[:after]
        return frames

    def _metadata(self, rng: random.Random, token: str) -> list[tuple[str, str]]:
        """The token; seldom a wrong one, and other things that the agents read."""
        found = [("authorization", f"Bearer {token if rng.random() > 0.005 else rng.choice(_WORDS)}")]
        if rng.random() < 0.05:
            found += [("kvlink-for", rng.choice(_WORDS)) for _ in range(rng.choice((1, 1, 2, 20)))]
        for name in ("traceparent", "kvlink-asked-by"):
            if rng.random() < 0.05:
                found.append((name, rng.choice(_WORDS)))
        return found

    def learn(self, plan: Plan, ended: Ended) -> None:
        """Remember what an agent gave, and what it was sent under."""
        if plan.peer == LEAST or plan.malformed:
            return
        if ended.last:
            told = GetMessageClass(plan.method.output_type).FromString(ended.last)
            self.seen.note(told)
            for name in ("context_id", "cache_id"):
                if getattr(told, name, ""):
                    self.own[plan.peer].add(name, getattr(told, name))
        if ended.status == "OK" or ended.answers:
            for message in plan.messages[:1]:
                parsed = GetMessageClass(plan.method.input_type).FromString(message)
                frame = wire_pb2.Frame.FromString(parsed.frame) if plan.method.name == "PushCache" else None
                for owner in (parsed, frame.manifest if frame else None):
                    for name in ("transfer_id", "delivery_id"):
                        if owner is not None and getattr(owner, name, b""):
                            self.seen.add(name, getattr(owner, name))
                            self.own[plan.peer].add(name, getattr(owner, name))


_WORDS = (
    "", "anna", "bert", "ella", "nobody", "x" * 64, "x" * 2000, "../x", "a b", "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    "00-" + "0" * 32 + "-" + "0" * 16 + "-00", "ff-x-y-z", "00-zz-zz-zz", "%0a%1b[2J", "Bearer Bearer",
)  # fmt: skip


async def call(channel: grpc.aio.Channel, plan: Plan) -> Ended:
    """Make a call as planned. Never raises for what the agent does."""
    ended, began = Ended(), time.monotonic()
    timeout_s = plan.after_s if plan.ending == "short deadline" else _CALL_S
    method = channel.stream_stream(
        f"/{plan.method.containing_service.full_name}/{plan.method.name}", None, None
    )
    made = method(timeout=timeout_s, metadata=plan.metadata)
    answered = asyncio.Event()
    writing = asyncio.create_task(_write(made, plan, ended, answered))
    giving_up = (
        asyncio.get_running_loop().call_later(plan.after_s, made.cancel)
        if plan.ending == "cancelled"
        else None
    )
    try:
        while (answer := await asyncio.wait_for(made.read(), HANG_S)) is not grpc.aio.EOF:
            answered.set()
            ended.answers += 1
            ended.last = answer
        code, details = await made.code(), await made.details()
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details()
    except TimeoutError:
        code, details = None, f"{ended.answers} answers, then nothing for {HANG_S:g} s"
    except asyncio.CancelledError:  # of the call; `made.cancelled()` may not know it yet
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        code, details = grpc.StatusCode.CANCELLED, ""
    finally:
        if giving_up is not None:
            giving_up.cancel()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        made.cancel()
    ended.status, ended.details = code.name if code else "HANG", details or ""
    ended.seconds = time.monotonic() - began
    if code is grpc.StatusCode.INTERNAL and details == "Internal error from Core":
        ended.status = LOST
    return ended


async def _write(made: Any, plan: Plan, ended: Ended, answered: asyncio.Event) -> None:
    """Write what the plan has, until the call is over: how it ended is for the reader to find out."""
    try:
        for number, message in enumerate(plan.messages):
            if number == 1 and plan.paced:
                await answered.wait()
            await made.write(message)
            ended.sent += 1
        if plan.ending == "left open":
            await asyncio.sleep(plan.after_s)
        await made.done_writing()
    except Exception:  # gRPC has several for a call that is over
        return
