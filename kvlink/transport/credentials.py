"""One peer's credentials: who it is, whom it dials, and who may call it and do what.

A folder made by `kvlink certs` (its files are described in `transport.certs`). It is looked at again at
every connection and every call, so that renewed certificates and edited `peers.toml` count at once;
files that cannot be read leave the last good ones in force, and the log says so.

Does not know: calls, agents. Place on the path: beside both ends of a connection.
"""

from __future__ import annotations

import datetime
import hmac
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvlink.errors import AccessError, ConfigError, CredentialsError, InputError
from kvlink.texts import read_toml
from kvlink.transport import certs
from kvlink.transport.address import Address

log = logging.getLogger("kvlink.credentials")

RIGHTS: dict[str, tuple[str, ...]] = {
    "GetCapabilities": ("look", "push", "generate", "publish", "fetch", "deliver"),
    "PushCache": ("push",),
    "GetTransferStatus": ("push",),
    "CancelTransfer": ("push",),
    "PutProfile": ("push",),
    "Generate": ("generate",),
    "DeleteCache": ("generate", "push"),
    "PublishContext": ("publish",),
    "UnpublishContext": ("publish",),
    "FetchCache": ("fetch",),
    "DeliverCache": ("deliver",),
    "CancelDelivery": ("deliver",),
}
"""Method → rights, any of which lets a peer call it."""

_WARN, _LEAST = datetime.timedelta(days=30), datetime.timedelta(days=1)
_REMIND = datetime.timedelta(days=1)
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class Dial:
    """A peer that may be dialled: the name that its certificate must bear, the token to show it."""

    name: str
    token: str


@dataclass(frozen=True, slots=True)
class _Access:
    token_sha256: str
    may: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Loaded:
    name: str
    since: datetime.datetime
    until: datetime.datetime
    authority: bytes
    key: bytes
    chain: bytes
    dial: dict[str, Dial]
    access: dict[str, _Access]


class Credentials:
    """A folder of credentials. Raises ConfigError where it cannot be read or does not fit together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()  # handshakes ask from threads of their own
        self._stamp = self._now()
        self._loaded = self._load()
        self._served: _Loaded | None = None
        self._reminded_at: datetime.datetime | None = None

    @property
    def name(self) -> str:
        """Who this peer is."""
        return self._fresh().name

    @property
    def expires_in_s(self) -> float:
        """Seconds until this peer's certificate expires; negative once it has."""
        return (self._fresh().until - datetime.datetime.now(datetime.UTC)).total_seconds()

    def remind(self) -> None:
        """Say in the log when the certificate expires: first as it is, then daily once little is left.

        Little: 30 days or half of its life, whichever is less, and at least a day.
        """
        told, now = self._fresh(), datetime.datetime.now(datetime.UTC)
        left, first = told.until - now, self._reminded_at is None
        little = left < max(_LEAST, min(_WARN, (told.until - told.since) / 2))
        if not first and (not little or now - (self._reminded_at or now) < _REMIND):
            return
        self._reminded_at = now
        log.log(
            logging.WARNING if little else logging.INFO,
            "the certificate of %r expires in %d s (%.1f days); 'kvlink certs renew' makes a new one",
            told.name, left.total_seconds(), left / _LEAST, extra={"expires_in_s": int(left.total_seconds())},
        )  # fmt: skip

    def check_valid(self) -> None:
        """Raise CredentialsError where this peer's certificate has expired."""
        told = self._fresh()
        if told.until <= datetime.datetime.now(datetime.UTC):
            raise CredentialsError(
                f"the certificate of {told.name!r} in {self.folder} expired at {told.until:%Y-%m-%d %H:%M} UTC; "
                "'kvlink certs renew' makes a new one"
            )

    def describe(self) -> dict[str, Any]:
        """Name, end of validity, whom it dials and who may call it; nothing secret."""
        told = self._fresh()
        return {
            "name": told.name,
            "valid_until": f"{told.until:%Y-%m-%d %H:%M} UTC",
            "expires_in_s": int((told.until - datetime.datetime.now(datetime.UTC)).total_seconds()),
            "expired": told.until <= datetime.datetime.now(datetime.UTC),
            "dials": {address: dial.name for address, dial in told.dial.items()},
            "lets_in": {name: sorted(access.may) for name, access in told.access.items()},
        }

    def addresses(self) -> list[str]:
        """Whom this peer dials."""
        return list(self._fresh().dial)

    def dial(self, address: str) -> Dial:
        """What to expect at an address and to show there. Raises AccessError where it is not listed."""
        found = self._fresh().dial.get(address)
        if found is None:
            raise AccessError(
                f"{address!r} is not in {self.folder / certs.PEERS} ({', '.join(self.addresses()) or 'nobody'}): "
                "not dialled, and shown nothing"
            )
        return found

    def channel(self) -> grpc.ChannelCredentials:
        """For dialling. Raises CredentialsError where the own certificate has expired."""
        self.check_valid()
        told = self._fresh()
        return grpc.ssl_channel_credentials(told.authority, told.key, told.chain)

    def server(self) -> grpc.ServerCredentials:
        """For listening: every caller needs a certificate; each handshake takes the newest files."""

        def newest() -> grpc.ServerCertificateConfiguration | None:
            told = self._fresh()
            if told is self._served:
                return None  # as before
            self._served = told
            return self._configuration(told)

        self._served = self._fresh()
        return grpc.dynamic_ssl_server_credentials(self._configuration(self._served), newest, True)

    def admit(self, name: str, token: str, method: str) -> None:
        """Let a peer call a method, or not.

        Raises CredentialsError (unknown peer or wrong token: the two look the same from outside) and
        AccessError (a known one that may not).
        """
        access = self._fresh().access.get(name)
        expected = access.token_sha256 if access else _NO_HASH
        proven = hmac.compare_digest(certs.hashed(token), expected)
        if access is None or not proven:
            raise CredentialsError("these credentials are not accepted here: unknown peer or wrong token")
        if not access.may & set(RIGHTS.get(method, ())):
            raise AccessError(f"{name!r} may not call {method} here")

    @staticmethod
    def _configuration(told: _Loaded) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(told.key, told.chain)], told.authority)

    def _now(self) -> tuple[int, ...]:
        stamps = []
        for name in (certs.AUTHORITY, certs.IDENTITY, certs.PEERS):
            try:
                found = (self.folder / name).stat()
            except OSError:
                stamps.append(0)
                continue
            stamps += [found.st_mtime_ns, found.st_ino, found.st_size]
        return tuple(stamps)

    def _fresh(self) -> _Loaded:
        with self._lock:
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    told = self._loaded = self._load()
                    log.info("credentials of %r read again, valid until %s", told.name, told.until)
                except ConfigError as error:
                    log.error("the last good credentials stay in force: %s", error)
            return self._loaded

    def _load(self) -> _Loaded:
        try:
            authority = (self.folder / certs.AUTHORITY).read_bytes()
            identity = (self.folder / certs.IDENTITY).read_bytes()
            peers = read_toml(self.folder / certs.PEERS, "the peers in")
        except (OSError, ConfigError) as error:
            inside = sorted(path.parent.name for path in self.folder.glob(f"*/{certs.PEERS}"))
            hint = (
                f"give one peer's folder of it: {', '.join(inside)}"
                if inside
                else "'kvlink certs init' makes them"
            )
            raise ConfigError(f"no credentials in {self.folder}: {error}; {hint}") from error
        key, mark, chain = identity.partition(b"-----BEGIN CERTIFICATE-----")
        name, since, until = certs.validity(mark + chain)
        if peers.get("name") != name:
            raise ConfigError(
                f"{self.folder}: the certificate is {name!r}'s, {certs.PEERS} says {peers.get('name')!r}"
            )
        dial, access = _peers(peers, self.folder / certs.PEERS)
        return _Loaded(name, since, until, authority, key, mark + chain, dial, access)


def _peers(peers: dict[str, Any], file: Path) -> tuple[dict[str, Dial], dict[str, _Access]]:
    """Whom a file lets its owner dial, and whom it lets in. Raises ConfigError, naming table and key.

    People edit it: what nothing reads is an error, so that no line stands there in vain.
    """
    of_file = {"name": str, "kind": str, "address": str, "dial": dict, "access": dict}
    _only(peers, of_file, {"name"}, str(file))
    dial, access = dict[str, Dial](), dict[str, _Access]()
    for at, told in peers.get("dial", {}).items():
        where = f"{file}: [dial.{at!r}]"
        _only(told, {"name": str, "token": str}, {"name", "token"}, where)
        try:
            dial[str(Address.parse(at))] = Dial(told["name"], told["token"])
        except InputError as error:
            raise ConfigError(f"{where}: {error}") from error
    for who, told in peers.get("access", {}).items():
        where = f"{file}: [access.{who!r}]"
        _only(told, {"token_sha256": str, "may": list}, {"token_sha256", "may"}, where)
        if not _SHA256.fullmatch(told["token_sha256"]):
            raise ConfigError(f"{where}: token_sha256 must be 64 hexadecimal digits in small letters")
        for right in told["may"]:
            if not isinstance(right, str) or right not in _KNOWN_RIGHTS:
                raise ConfigError(
                    f"{where}: there is no right {right!r}; known: {', '.join(sorted(_KNOWN_RIGHTS))}"
                )
        access[who] = _Access(told["token_sha256"], frozenset(told["may"]))
    return dial, access


def _only(table: Any, types: Mapping[str, type], needed: set[str], where: str) -> None:
    """Raise ConfigError where a table is none, lacks a key, or has another one or another type."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    for key, value in table.items():
        if key not in types:
            raise ConfigError(f"{where}: nothing reads {key!r}; known: {', '.join(types)}")
        if not isinstance(value, types[key]):
            raise ConfigError(f"{where}: {key} must be {_IN_WORDS[types[key]]}, got {value!r}")
    for key in sorted(needed - table.keys()):
        raise ConfigError(f"{where}: {key} is missing")


_KNOWN_RIGHTS = frozenset(right for rights in RIGHTS.values() for right in rights)
_SHA256 = re.compile("[0-9a-f]{64}")
_IN_WORDS: dict[type, str] = {str: "a text", dict: "a table", list: "a list"}
