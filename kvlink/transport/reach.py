"""Why a peer cannot be reached: what gRPC does not tell, found out by a plain connection.

Does not know: calls. Place on the path: beside a channel that does not connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time

from kvlink.errors import ConfigError, CredentialsError, KvlinkError, PeerUnavailableError
from kvlink.transport import certs
from kvlink.transport.address import Address
from kvlink.transport.credentials import Credentials, Dial

_TRY_S = 2.0

_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 says first: the preface, and settings without a setting."""
_SETTINGS = 4
"""The type of the frame that a server of HTTP/2 says first, at byte 3."""
_ALERT = b"\x15\x03"
"""How TLS says that it did not understand."""

_REASONS = {
    errno.ECONNREFUSED: "nobody listens there (connection refused)",
    errno.EHOSTUNREACH: "no way there (host unreachable)",
    errno.ENETUNREACH: "no way there (network unreachable)",
    errno.EADDRNOTAVAIL: "no way there (this machine has no such kind of address)",
}


async def listening(address: Address) -> str:
    """Why nobody answers at an address; empty where somebody listens, or silence leaves it open."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_TRY_S):
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            reasons = [await _connect(family, at) for family, _, _, _, at in found]
    except socket.gaierror as error:
        return f"no such host: {error.strerror}"
    except (OSError, UnicodeError) as error:
        return str(error)
    except TimeoutError:
        return ""
    return reasons[-1] if all(reasons) else ""


async def _connect(family: int, at: tuple[object, ...]) -> str:
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, at)
        except OSError as error:
            return _REASONS.get(error.errno or 0, error.strerror or str(error))
        return ""


async def refusal(address: Address, credentials: Credentials | None, dial: Dial | None) -> KvlinkError | None:
    """The error of a connection that failed, where waiting longer is of no use."""
    why = await listening(address)
    if why:
        return PeerUnavailableError(f"{address}: {why}")
    if credentials is None or dial is None:
        return await _other_protocol(address)
    why = await _handshake(address, credentials, dial)
    return CredentialsError(f"{address}: no connection to {dial.name!r}: {why}") if why else None


async def _other_protocol(address: Address) -> KvlinkError | None:
    """The error of a peer that answers, and not as gRPC does; None where it says nothing."""
    try:
        async with asyncio.timeout(_TRY_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            with contextlib.closing(writer):
                writer.write(_OPENING)
                said = await reader.read(64)
    except (OSError, TimeoutError):
        return None
    if said.startswith(_ALERT):
        return CredentialsError(f"{address}: it speaks TLS: an agent with TLS needs --credentials here too")
    if not said or said[3:4] == bytes((_SETTINGS,)):
        return None
    line = said.splitlines()[0].decode("ascii", "replace")
    return ConfigError(f"{address}: no gRPC is spoken there: it answers {line!r}")


async def _handshake(address: Address, credentials: Credentials, dial: Dial) -> str:
    """Why TLS fails with a peer that listens; empty where nothing is wrong."""
    context = _context(credentials)
    try:
        async with asyncio.timeout(_TRY_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, server_hostname=dial.name
            )
            try:
                if await reader.read(1):  # the peer speaks: it has accepted the certificate
                    return ""
                return "the peer closed the connection: it does not accept this certificate"
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as error:
        return f"its certificate does not hold: {error.verify_message}"
    except ssl.SSLError as error:
        return (error.reason or str(error)).lower().replace("_", " ")
    except ConnectionResetError:
        return "the peer closed the connection: it does not accept this certificate"
    except (OSError, TimeoutError):
        return ""


def _context(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(credentials.folder / certs.AUTHORITY))
    context.load_cert_chain(credentials.folder / certs.IDENTITY)
    context.set_alpn_protocols(["h2"])
    return context


async def expires_in_s(address: Address, credentials: Credentials) -> float | None:
    """Seconds until the certificate of who listens there expires; None where it cannot be seen."""
    try:
        async with asyncio.timeout(_TRY_S):
            _, writer = await asyncio.open_connection(
                address.host, address.port, ssl=_context(credentials),
                server_hostname=credentials.dial(str(address)).name,
            )  # fmt: skip
            shown = writer.get_extra_info("peercert") or {}
            writer.close()
    except (OSError, TimeoutError, KvlinkError):
        return None
    until = shown.get("notAfter")
    return ssl.cert_time_to_seconds(until) - time.time() if isinstance(until, str) else None
