"""Raw calls to an agent, as somebody makes them who has read the proto; and what others notice meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from kvlink.transport.credentials import Credentials
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.fuzz.agents import Agent
from tests.limits import HANGS_S

TEXT = (
    "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Tavik is a town. Jand Faris plays the cello every "
    "evening. Rom Tecil works for Gestox Energy."
)
QUESTION = "What instrument does Jand Faris play?"
ANSWER = "cello"

REFUSED_S = 5.0
"""What is refused by its length or its head is refused within: reading it would take half a minute."""
OTHERS_S = 2.0
"""Meanwhile another caller is answered within."""
MEMORY_BYTES = 300_000_000
"""And the agent grows by less."""

_SERVICES = {
    "receiver": receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"],
    "sender": sender_pb2.DESCRIPTOR.services_by_name["SenderService"],
}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


class Peer:
    """One caller of one agent, with what it proves itself by. Nothing of what it sends is checked here."""

    def __init__(self, agent: Agent, credentials: Credentials) -> None:
        self._service = _SERVICES[agent.kind]
        dial = credentials.dial(agent.address)
        self._shown = [("authorization", f"Bearer {dial.token}")]
        options = [*_OPTIONS, ("grpc.ssl_target_name_override", dial.name)]
        self._channel = grpc.secure_channel(agent.address, credentials.channel(), options)

    def start(
        self, method: str, messages: Iterable[Any], readers: Sequence[str] = (), timeout_s: float = HANGS_S
    ) -> Any:
        """A call that goes on: an iterator of answers, which raises grpc.RpcError where it ends badly."""
        answers = GetMessageClass(self._service.methods_by_name[method].output_type).FromString
        path = f"/{self._service.full_name}/{method}"
        call = self._channel.stream_stream(path, lambda message: message.SerializeToString(), answers)
        metadata = [*self._shown, *(("kvlink-for", reader) for reader in readers)]
        return call(iter(messages), timeout=timeout_s, metadata=metadata)

    def call(self, method: str, *messages: Any) -> list[Any]:
        """The answers. Raises grpc.RpcError."""
        return list(self.start(method, messages))

    def push(self, frames: Iterable[bytes], readers: Sequence[str] = (), timeout_s: float = HANGS_S) -> Any:
        """The receiver's last word on a transfer."""
        messages = (receiver_pb2.PushCacheRequest(frame=frame) for frame in frames)
        return list(self.start("PushCache", messages, readers, timeout_s))[-1]

    def answer(self, cache_id: str, timeout_s: float = HANGS_S, **asked: Any) -> str:
        """What is answered to QUESTION."""
        asked = {"question": QUESTION, **asked}
        request = receiver_pb2.GenerateRequest(cache_id=cache_id, **asked)
        return "".join(piece.text for piece in self.start("Generate", [request], (), timeout_s)).strip()

    def close(self) -> None:
        self._channel.close()


def ended(work: Callable[[], object]) -> tuple[str, str]:
    """Status and message that a call ends with; "OK" and what it returned as text."""
    try:
        return "OK", str(work())
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""  # type: ignore[attr-defined]


class Beside:
    """While an agent is given something to chew: how long another caller waits, and how much memory it takes."""

    def __init__(self, agent: Agent, caller: Peer) -> None:
        self._agent, self._caller = agent, caller
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.waited_s = self.seconds = 0.0
        """The longest wait of the other caller; how long all of it took."""
        self.grown_bytes = 0

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            began = time.monotonic()
            self._caller.call("GetCapabilities", common_pb2.GetCapabilitiesRequest())
            self.waited_s = max(self.waited_s, time.monotonic() - began)

    def __enter__(self) -> Beside:
        self._caller.call("GetCapabilities", common_pb2.GetCapabilitiesRequest())
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._agent.process.pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before_bytes = self._peak_bytes()
        self._thread.start()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._began
        self._over.set()
        self._thread.join()
        self.grown_bytes = self._peak_bytes() - self._before_bytes

    def _peak_bytes(self) -> int:
        """0 where the system does not tell."""
        try:
            status = Path(f"/proc/{self._agent.process.pid}/status").read_text()
        except OSError:
            return 0
        return sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    def require_unmoved(self) -> None:
        """The agent refused at once, and nobody else noticed."""
        assert self.seconds < REFUSED_S
        assert self.waited_s < OTHERS_S
        assert self.grown_bytes < MEMORY_BYTES
