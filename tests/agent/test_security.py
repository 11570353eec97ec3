"""Who gets in: certificates, tokens, rights and handles, over real TLS."""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import SenderSettings
from kvlink.errors import (
    AccessError,
    CredentialsError,
    KvlinkError,
    NotFoundError,
    PeerUnavailableError,
)
from kvlink.transport import certs
from kvlink.transport.address import Address
from kvlink.transport.api import Ask, Caller, Delivery, Fetch
from kvlink.transport.certs import Member
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.credentials import Credentials
from kvlink.transport.dial import to_receivers
from kvlink.transport.reach import expires_in_s
from kvlink.transport.server import Server
from kvlink.v1 import common_pb2, receiver_pb2, receiver_pb2_grpc, sender_pb2
from tests.agent.conftest import QUESTION, TEXT
from tests.command import free_address
from tests.limits import HANGS_S


@dataclass
class Network:
    """Two agents that ask everybody for credentials. `anna` and `bert` are clients."""

    folder: Path
    receiver: ReceiverService
    sender: SenderService
    receiver_at: str
    sender_at: str

    def credentials(self, name: str) -> Credentials:
        return Credentials(self.folder / name)

    def receiver_as(self, name: str) -> ReceiverClient:
        return ReceiverClient(self.receiver_at, self.credentials(name))

    def sender_as(self, name: str) -> SenderClient:
        return SenderClient(self.sender_at, self.credentials(name))

    async def deliver(self, name: str = "anna", **options) -> str:
        options.setdefault("text", "" if options.get("context_id") else TEXT)
        async with self.sender_as(name) as source:
            async for progress in source.deliver(Delivery(self.receiver_at, QUESTION, "int8", **options)):
                last = progress
        return last.cache_id

    async def answer(self, name: str, cache_id: str) -> str:
        async with self.receiver_as(name) as target:
            return "".join([piece.text async for piece in target.generate(Ask(cache_id, QUESTION))])


@pytest.fixture
async def network(random_lm, tmp_path) -> AsyncIterator[Network]:
    lm, folder = random_lm("qwen2", "bfloat16"), tmp_path / "network"
    receiver_at, sender_at = (free_address() for _ in range(2))
    members = [Member("reader", "receiver", receiver_at), Member("writer", "sender", sender_at)]
    certs.begin(folder, [*members, Member("anna", "client"), Member("bert", "client")])
    receiver = ReceiverService(Receiver(lm))
    settings = SenderSettings(credentials=Credentials(folder / "writer"))
    sender = SenderService(Sender(lm), settings, dial=to_receivers(settings.credentials))
    servers = [
        Server(receiver_at, receiver=receiver, credentials=Credentials(folder / "reader")),
        Server(sender_at, sender=sender, credentials=Credentials(folder / "writer")),
    ]
    for server in servers:
        await server.start()
    yield Network(folder, receiver, sender, receiver_at, sender_at)
    for server in servers:
        await server.stop(0)


async def test_known_peers_deliver_and_answer(network):
    cache_id = await network.deliver("anna")
    assert await network.answer("anna", cache_id)


async def raw_call(network: Network, **options) -> grpc.aio.AioRpcError:
    """What a stranger's own gRPC client gets from the receiver, whatever it asks."""
    folder = network.folder / "anna"
    identity = options.get("identity", identity_of(folder))
    proof = grpc.ssl_channel_credentials((folder / certs.AUTHORITY).read_bytes(), *identity)
    channel = grpc.aio.secure_channel(
        network.receiver_at, proof, options=[("grpc.ssl_target_name_override", "reader")]
    )
    async with channel:
        stub = receiver_pb2_grpc.ReceiverServiceStub(channel)
        metadata = [("authorization", f"Bearer {options['token']}")] if "token" in options else []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCapabilities(
                common_pb2.GetCapabilitiesRequest(), timeout=HANGS_S, metadata=metadata
            )
        return caught.value


def identity_of(folder: Path) -> tuple[bytes, bytes]:
    key, mark, chain = (folder / certs.IDENTITY).read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
    return key, mark + chain


async def test_without_a_certificate_there_is_no_connection(network):
    error = await raw_call(network, identity=(None, None))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_an_expired_certificate_there_is_no_connection(network):
    certs._issue(network.folder, "anna", -0.001)
    error = await raw_call(network)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(CredentialsError, match=r"the certificate of 'anna' .* expired at .*certs renew"):
        await network.deliver("anna")


async def test_with_a_certificate_of_another_authority_there_is_no_connection(network, tmp_path):
    certs.begin(tmp_path / "other", [Member("anna", "client")])
    error = await raw_call(network, identity=identity_of(tmp_path / "other" / "anna"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("options", [{}, {"token": ""}, {"token": "wrong"}, {"token": "x" * 5_000}])
async def test_with_a_wrong_token_a_call_is_unauthenticated(network, options):
    error = await raw_call(network, **options)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error.details() == "these credentials are not accepted here: unknown peer or wrong token"


async def test_a_peer_that_is_not_listed_looks_like_a_wrong_token(network):
    certs.add(network.folder, Member("carl", "client"))
    peers = network.folder / "reader" / certs.PEERS
    peers.write_text(peers.read_text().replace('[access."carl"]', '[access."somebody"]'))
    error = await raw_call(network, identity=identity_of(network.folder / "carl"), token="wrong")
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error.details() == "these credentials are not accepted here: unknown peer or wrong token"


async def test_a_right_that_was_not_given_is_denied(network):
    sender = network.receiver_as("writer")  # it may push, not generate
    async with sender as target:
        with pytest.raises(AccessError, match="'writer' may not call Generate here"):
            [piece async for piece in target.generate(Ask("x", QUESTION))]
    async with network.receiver_as("anna") as target:
        with pytest.raises(AccessError, match="may not call PushCache"):
            [item async for item in target.push([b""])]


async def test_somebody_elses_handle_is_not_there(network):
    """The same words as for a handle that never was: nothing is learnt from trying."""
    async with network.sender_as("anna") as source:
        published = await source.publish(TEXT)
    async with network.sender_as("bert") as source:
        found = []
        for context_id in (published.context_id, "never-there"):
            for call in (source.fetch(Fetch(context_id, QUESTION, "int8")), None):
                with pytest.raises(NotFoundError) as caught:
                    if call is None:
                        await source.unpublish(context_id)
                    else:
                        [frame async for frame in call]
                found.append(str(caught.value))
    assert len(set(found)) == 1
    with pytest.raises(NotFoundError):
        await network.deliver("bert", context_id=published.context_id)
    assert await network.deliver("anna", context_id=published.context_id), "it is still there for its owner"


async def test_a_handle_opens_for_the_readers_that_its_publisher_named(network):
    async with network.sender_as("anna") as source:
        published = await source.publish(TEXT, readers=["bert"])
    assert await network.deliver("bert", context_id=published.context_id)


async def test_somebody_elses_cache_is_not_there(network):
    cache_id = await network.deliver("anna")
    async with network.receiver_as("bert") as target:
        with pytest.raises(NotFoundError, match="never there, deleted or expired"):
            [piece async for piece in target.generate(Ask(cache_id, QUESTION))]
        with pytest.raises(NotFoundError):
            await target.delete_cache(cache_id)
    assert await network.answer("anna", cache_id)


async def test_somebody_elses_transfer_cannot_be_resumed_seen_or_cancelled(network):
    certs.add(network.folder, Member("other", "sender", "127.0.0.1:9"))
    sender = network.sender._sender
    frames = sender.pack(sender.read(TEXT), QUESTION, "int8", transfer_id=b"t" * 16).frames
    async with network.receiver_as("writer") as target:
        pushing = target.push(frames[:1])
        assert (await anext(pushing)).state == "accepted"
        async with network.receiver_as("other") as thief:
            with pytest.raises(NotFoundError):
                await thief.transfer_status(b"t" * 16)
            await thief.cancel(b"t" * 16)
            with pytest.raises(AccessError, match="this transfer id is taken"):
                [item async for item in thief.push(frames)]
        await pushing.aclose()
        states = [item.state async for item in target.push(frames) if not isinstance(item, int)]
    assert states[-1] == "complete"


async def test_the_other_end_must_be_who_it_is_taken_for(network):
    """The writer's certificate, valid as it is, does not make it the reader."""
    listed = network.folder / "anna" / certs.PEERS
    listed.write_text(listed.read_text().replace(network.sender_at, "127.0.0.1:1").replace(
        f'[dial."{network.receiver_at}"]', f'[dial."{network.sender_at}"]'
    ))  # fmt: skip
    with pytest.raises(CredentialsError, match="no connection to 'reader'"):
        async with ReceiverClient(network.sender_at, network.credentials("anna")):
            pass


async def test_nobody_dials_or_shows_a_token_to_an_address_that_is_not_listed(network):
    with pytest.raises(AccessError, match="not dialled, and shown nothing"):
        ReceiverClient("127.0.0.1:9", network.credentials("anna"))
    with pytest.raises(AccessError, match="not in this agent's peer list"):
        async with network.sender_as("anna") as source:
            [p async for p in source.deliver(Delivery("127.0.0.1:9", QUESTION, "int8", text=TEXT))]


@pytest.mark.parametrize("address", ["10.1.2.3:50052", "receiver:50052"])
def test_off_loopback_nothing_is_dialled_without_encryption_unless_told(address):
    with pytest.raises(AccessError, match="refusing to dial .* without encryption"):
        ReceiverClient(address)
    ReceiverClient(address, insecure=True)


async def test_a_plain_client_is_told_what_the_agent_may_want(network, monkeypatch):
    monkeypatch.setattr("kvlink.transport.channel.CONNECT_S", 0.5)
    with pytest.raises(PeerUnavailableError, match="an agent with TLS needs --credentials here too"):
        async with ReceiverClient(network.receiver_at):
            pass


async def test_renewed_certificates_count_without_a_restart(network):
    before = {name: (network.folder / name / certs.IDENTITY).read_bytes() for name in ("reader", "anna")}
    cache_id = await network.deliver("anna")
    certs.renew(network.folder, 1.0)
    for name, old in before.items():
        assert (network.folder / name / certs.IDENTITY).read_bytes() != old
    assert await network.answer("anna", cache_id)
    pem = await asyncio.to_thread(_served_certificate, network)
    assert pem in (network.folder / "reader" / certs.IDENTITY).read_text()


def _served_certificate(network: Network) -> str:
    """The certificate that the receiver shows to a new connection."""
    context = ssl.create_default_context(cafile=str(network.folder / "anna" / certs.AUTHORITY))
    context.load_cert_chain(network.folder / "anna" / certs.IDENTITY)
    context.set_alpn_protocols(["h2"])
    host, port = network.receiver_at.split(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(
        plain, server_hostname="reader"
    ) as sock:  # fmt: skip
        return ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True)).strip().splitlines()[1]


async def test_a_peer_that_is_struck_off_is_out_at_its_next_call(network):
    async with network.receiver_as("anna") as target:
        await target.capabilities()
        peers = network.folder / "reader" / certs.PEERS
        peers.write_text(peers.read_text().partition('\n[access."anna"]')[0])
        with pytest.raises(CredentialsError):
            await target.capabilities()


async def test_a_broken_edit_leaves_the_last_good_credentials_in_force(network, caplog):
    peers = network.folder / "reader" / certs.PEERS
    good = peers.read_text()
    peers.write_text(good + "\n[access")
    async with network.receiver_as("anna") as target:
        await target.capabilities()
    assert "the last good credentials stay in force" in caplog.text


async def test_nothing_secret_is_logged(network, caplog):
    caplog.set_level(logging.DEBUG, "kvlink")
    async with network.sender_as("anna") as source:
        published = await source.publish(TEXT)
    cache_id = await network.deliver("anna", context_id=published.context_id)
    answer = await network.answer("anna", cache_id)
    with pytest.raises(NotFoundError):
        await network.answer("bert", cache_id)
    tokens = re.findall(r'token = "(.+)"', (network.folder / "anna" / certs.PEERS).read_text())
    assert len(tokens) == 2
    said = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "transfer complete" in said
    for secret in (*tokens, published.context_id, cache_id, QUESTION, "Tavik", answer.strip() or QUESTION):
        assert secret not in said


async def test_a_forged_list_of_readers_is_refused(network):
    async with network.receiver_as("writer") as target:
        with pytest.raises(Exception, match="at most 16 names of peers"):
            [item async for item in target.push([b""], readers=["a b"])]


async def test_health_tells_strangers_nothing(network):
    async with grpc.aio.insecure_channel(network.receiver_at) as channel:
        stub = receiver_pb2_grpc.ReceiverServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetTransferStatus(receiver_pb2.GetTransferStatusRequest(), timeout=HANGS_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


ROLES = {
    # who       removes a cache, a context; cancels a transfer, a delivery
    "writer": (None, AccessError, None, AccessError),  # the sender: it pushed the cache
    "anna": (None, None, AccessError, None),  # a client: she published, and asked for the delivery
    "bert": (AccessError, AccessError, AccessError, None),  # a client, named as a reader of both
    "carl": (NotFoundError, NotFoundError, AccessError, None),  # a client, named nowhere
}
"""What each call says; where it is nothing to somebody else's, it must have done nothing."""


@pytest.mark.parametrize("who", ROLES)
async def test_only_its_owner_and_who_asked_for_it_removes_anything(network, who):
    certs.add(network.folder, Member("carl", "client"))
    frames = network.sender._sender.pack(network.sender._sender.read(TEXT), QUESTION, "int8").frames
    async with (
        ReceiverClient(network.receiver_at, network.credentials("writer")) as writer,
        network.sender_as("anna") as source,
    ):
        async for item in writer.push(frames, readers=["bert"], asked_by="anna"):
            cache_id = "" if isinstance(item, int) else item.cache_id
        context_id = (await source.publish(TEXT, readers=["bert"])).context_id
        begun = bytes(16)
        asked = network.sender._sender.pack(
            network.sender._sender.read(TEXT), QUESTION, "int8", transfer_id=begun
        ).frames

        async def stream() -> AsyncIterator[bytes]:
            for frame in asked[:2]:
                yield frame
            await asyncio.Event().wait()

        pushing = network.receiver.push_cache(stream(), Caller("writer"))
        assert (await anext(pushing)).state == "accepted"

        async def do(call: str) -> KvlinkError | None:
            try:
                async with (
                    network.receiver_as(who)
                    if call in ("cache", "transfer")
                    else network.sender_as(who) as peer
                ):
                    await {
                        "cache": lambda: peer.delete_cache(cache_id),
                        "context": lambda: peer.unpublish(context_id),
                        "transfer": lambda: peer._unary(
                            "CancelTransfer",
                            receiver_pb2.CancelTransferRequest(transfer_id=begun),
                        ),
                        "delivery": lambda: peer._unary(
                            "CancelDelivery",
                            sender_pb2.CancelDeliveryRequest(delivery_id=begun),
                        ),
                    }[call]()
            except KvlinkError as error:
                return error
            return None

        told = [await do(call) for call in ("cache", "context", "transfer", "delivery")]
        assert [error and type(error) for error in told] == list(ROLES[who])
        assert (cache_id in network.receiver.store) is (who not in ("writer", "anna"))
        assert (context_id in network.sender.store) is (who != "anna")
        state = (await network.receiver.transfer_status(begun, Caller("writer"))).state
        assert state == ("cancelled" if who == "writer" else "accepted")
        await pushing.aclose()


async def test_who_asked_for_a_delivery_deletes_its_cache_and_others_use_it_meanwhile(network):
    cache_id = await network.deliver("anna")
    async with network.receiver_as("bert") as target:
        with pytest.raises(NotFoundError):
            await target.delete_cache(cache_id)
    assert await network.answer("anna", cache_id)
    async with network.receiver_as("anna") as target:
        await target.delete_cache(cache_id)
        with pytest.raises(NotFoundError):
            await network.answer("anna", cache_id)


@pytest.mark.parametrize(("days", "level"), [(7, "INFO"), (60, "INFO"), (0.5, "WARNING"), (-0.5, "WARNING")])
def test_a_certificate_that_runs_out_is_said_at_once_and_daily(tmp_path, caplog, days, level):
    caplog.set_level("INFO", "kvlink.credentials")
    certs.begin(tmp_path / "net", [Member("anna", "client")], days)
    credentials = Credentials(tmp_path / "net" / "anna")
    assert credentials.expires_in_s == pytest.approx(days * 86_400, abs=600)
    for _ in range(3):
        credentials.remind()
    (line,) = caplog.records
    assert line.levelname == level
    assert line.expires_in_s == pytest.approx(days * 86_400, abs=600)
    credentials._reminded_at -= datetime.timedelta(days=1)
    credentials.remind()
    assert len(caplog.records) == (2 if level == "WARNING" else 1)


async def test_the_end_of_an_agents_certificate_can_be_seen(network):
    at = Address.parse(network.receiver_at)
    seen = await expires_in_s(at, network.credentials("anna"))
    assert seen == pytest.approx(network.credentials("reader").expires_in_s, abs=60)
    assert await expires_in_s(Address.parse(free_address()), network.credentials("anna")) is None
