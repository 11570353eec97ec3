"""Clients without an event loop: the same calls, for code that has none."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.errors import ContextError, LocalProtocolError, NotFoundError
from kvlink.transport.api import Ask, Delivery, Fetch
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server
from kvlink.transport.sync import SyncReceiverClient, SyncSenderClient

TEXT = "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening."
QUESTION = "What instrument does Jand Faris play?"
THREAD = "kvlink-clients"


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(scope="module")
def addresses(tiny) -> Iterator[tuple[str, str]]:
    """A sender and a receiver, on an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def started() -> tuple[list[Server], list[int]]:
        made = [
            Server("127.0.0.1:0", sender=SenderService(Sender(tiny), dial=to_receivers())),
            Server("127.0.0.1:0", receiver=ReceiverService(Receiver(tiny))),
        ]
        return made, [await server.start() for server in made]

    servers, ports = there(started())
    yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    for server in servers:
        there(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_deliver_and_answer(addresses):
    with SyncSenderClient(addresses[0]) as sender, SyncReceiverClient(addresses[1]) as receiver:
        assert sender.health() == receiver.health() == "SERVING"
        *_, last = sender.deliver(Delivery(addresses[1], QUESTION, "int8", text=TEXT))
        assert last.done
        pieces = list(receiver.generate(Ask(last.cache_id, QUESTION)))
        assert "".join(piece.text for piece in pieces).strip() == "cello"
        receiver.delete_cache(last.cache_id)
        with pytest.raises(NotFoundError):
            list(receiver.generate(Ask(last.cache_id, QUESTION)))
        assert len(loop_threads()) == 1
    assert not loop_threads()


def test_publish_fetch_and_push(addresses):
    with SyncSenderClient(addresses[0]) as sender, SyncReceiverClient(addresses[1]) as receiver:
        published = sender.publish(TEXT, turns=[{"role": "user", "content": "Hello."}])
        frames = list(sender.fetch(Fetch(published.context_id, QUESTION, "raw")))
        statuses = [item for item in receiver.push(frames) if not isinstance(item, int)]
        assert statuses[-1].cache_id
        assert receiver.transfer_status(bytes.fromhex(statuses[-1].receipt.transfer_id)).cache_id
        sender.unpublish(published.context_id)
        assert receiver.capabilities().fingerprint == sender.capabilities().fingerprint


def test_an_iterator_that_is_left_early_ends_its_call(addresses):
    with SyncReceiverClient(addresses[1]) as receiver, SyncSenderClient(addresses[0]) as sender:
        *_, last = sender.deliver(Delivery(addresses[1], QUESTION, "int8", text=TEXT))
        pieces = receiver.generate(Ask(last.cache_id, QUESTION))
        next(pieces)
        pieces.close()
        receiver.delete_cache(last.cache_id)
        left = sender.deliver(Delivery(addresses[1], QUESTION, "int8", text=TEXT))
        next(left)
    left.close()  # behind its client: nothing is left to end
    assert not loop_threads()


def test_errors_come_as_they_are(addresses):
    with SyncSenderClient(addresses[0]) as sender, pytest.raises(ContextError, match="empty"):
        sender.publish(" ")


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside one that is connected"])
def test_outside_of_its_context_manager_it_says_so(addresses, other):
    client = SyncReceiverClient(addresses[1])
    with SyncSenderClient(addresses[0]) if other else client:
        if not other:
            client.capabilities()
        else:
            with pytest.raises(LocalProtocolError, match="inside of 'with SyncReceiverClient"):
                client.capabilities()
    for call in (client.capabilities, lambda: list(client.generate(Ask("id", "Who?")))):
        with pytest.raises(LocalProtocolError, match="inside of 'with SyncReceiverClient"):
            call()


async def test_where_an_event_loop_runs_it_says_so(addresses):
    with (
        pytest.raises(LocalProtocolError, match="use the client without Sync"),
        SyncReceiverClient(addresses[1]),
    ):
        pass
    assert not loop_threads()


@pytest.mark.parametrize(
    ("own", "other"), [(SyncReceiverClient, ReceiverClient), (SyncSenderClient, SenderClient)]
)
def test_every_call_is_there_with_its_parameters(own, other):
    for name, call in inspect.getmembers(other, inspect.isfunction):
        if not name.startswith("_") and name != "socket_count":
            assert inspect.signature(getattr(own, name)).parameters == inspect.signature(call).parameters, (
                name
            )


def test_a_process_that_never_leaves_its_client_ends_all_the_same(addresses):
    code = (
        "from kvlink.transport.sync import SyncReceiverClient; import sys\n"
        "print(SyncReceiverClient(sys.argv[1]).__enter__().health())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, addresses[1]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVING\n", "")
