"""Certificates and tokens for a set of agents and clients: made, added to, and renewed.

A network's folder holds one folder for each peer, which is all that this peer needs, and `authority/`,
which stays with whoever issues:

    NETWORK/authority/  authority.pem  authority.key
    NETWORK/NAME/       authority.pem  identity.pem  peers.toml

`identity.pem` is the peer's key and short-lived certificate in one file, so that a renewal replaces
both at once. `peers.toml` says whom the peer dials and what it shows there, and who may call it and do
what. Certificates name the peer, not its address.

Does not know: connections. Place on the path: before it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvlink.defaults import CERTIFICATE_DAYS
from kvlink.errors import ConfigError
from kvlink.files import whole_file
from kvlink.texts import read_toml
from kvlink.transport.address import Address

Kind = Literal["sender", "receiver", "client"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AUTHORITY_DAYS = 3650.0
AUTHORITY, IDENTITY, PEERS = "authority.pem", "identity.pem", "peers.toml"
_AUTHORITY_KEY = "authority.key"
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_SKEW = datetime.timedelta(minutes=5)

RIGHTS_BY_KIND: dict[tuple[Kind, Kind], tuple[str, ...]] = {
    ("sender", "receiver"): ("push",),
    ("client", "receiver"): ("generate",),
    ("client", "sender"): ("publish", "fetch", "deliver"),
    ("receiver", "sender"): ("fetch",),
}
"""(who calls, whom) → what it may do there, unless its `peers.toml` is edited."""


@dataclass(frozen=True, slots=True)
class Member:
    """A peer of the network. `address`: host:port where it listens; empty for a client."""

    name: str
    kind: Kind
    address: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == "authority":
            raise ConfigError(
                f"a peer's name has letters, digits, '.', '_' and '-', at most 64, got {self.name!r}"
            )
        if self.address or self.kind != "client":
            object.__setattr__(self, "address", str(Address.parse(self.address)))


def begin(folder: Path, members: Iterable[Member], days: float = CERTIFICATE_DAYS) -> list[Path]:
    """Make an authority, and a folder of credentials for each member; returns these folders.

    Raises ConfigError where the folder holds an authority already, or names are used twice.
    """
    members = list(members)
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise ConfigError(f"every peer needs a name of its own, got {', '.join(names)}")
    if (folder / "authority").exists():
        raise ConfigError(f"{folder} holds an authority already; use 'kvlink certs add' or 'renew'")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvlink authority")])
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    at = folder / "authority"
    _make(at)
    _write(at / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
    _write(at / _AUTHORITY_KEY, _key_bytes(key))
    made: list[Path] = []
    known: list[Member] = []
    for member in members:
        made.append(_join(folder, member, known, days))
        known.append(member)
    return made


def add(folder: Path, member: Member, days: float = CERTIFICATE_DAYS) -> Path:
    """Add a peer to a network; the others' `peers.toml` gain a table. Raises ConfigError."""
    known = members_of(folder)
    if member.name in [other.name for other in known]:
        raise ConfigError(f"{folder} has a peer named {member.name!r} already")
    return _join(folder, member, known, days)


def renew(folder: Path, days: float = CERTIFICATE_DAYS) -> list[tuple[str, datetime.datetime]]:
    """Give every peer of the network a new key and certificate; names, and until when they are valid.

    Running agents take them up at their next connection. Raises ConfigError.
    """
    told = []
    for member in members_of(folder):
        told.append((member.name, _issue(folder, member.name, days)))
    return told


def members_of(folder: Path) -> list[Member]:
    """The peers of a network. Raises ConfigError where it is none."""
    if not (folder / "authority" / AUTHORITY).exists():
        raise ConfigError(f"{folder} holds no authority; 'kvlink certs init {folder}' makes one")
    found = []
    for path in sorted(folder.glob(f"*/{PEERS}")):
        told = read_toml(path, "the peer in")
        name, kind, address = (told.get(key, "") for key in ("name", "kind", "address"))
        if kind not in KINDS or not isinstance(name, str) or not isinstance(address, str):
            raise ConfigError(f"{path}: expected a name, a kind ({', '.join(KINDS)}) and an address as texts")
        try:
            found.append(Member(name, kind, address))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return found


def validity(identity: bytes) -> tuple[str, datetime.datetime, datetime.datetime]:
    """The name in a PEM certificate, since when and until when it is valid. Raises ConfigError."""
    try:
        certificate = x509.load_pem_x509_certificate(identity)
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError as error:
        raise ConfigError(f"no certificate of a kvlink peer: {error}") from error
    return str(name.value), certificate.not_valid_before_utc, certificate.not_valid_after_utc


def hashed(token: str) -> str:
    """What a peer keeps of a token that others show it. Tokens have 256 random bits: a plain hash does."""
    return hashlib.sha256(token.encode()).hexdigest()


def _join(folder: Path, member: Member, known: Iterable[Member], days: float) -> Path:
    home = folder / member.name
    _make(home)
    _write(home / AUTHORITY, (folder / "authority" / AUTHORITY).read_bytes())
    _issue(folder, member.name, days)
    lines = [f'name = "{member.name}"', f'kind = "{member.kind}"']
    lines += [f'address = "{member.address}"'] if member.address else []
    _write(home / PEERS, ("\n".join(lines) + "\n").encode())
    if member.address:  # an agent may ask itself how it is
        at = Address.parse(member.address)
        here = Address("::1" if ":" in at.host else "127.0.0.1", at.port)
        own = Member(member.name, member.kind, str(here))
        _introduce(folder, member, own, ("look",))
    for other in known:
        for caller, called in ((member, other), (other, member)):
            rights = RIGHTS_BY_KIND.get((caller.kind, called.kind))
            if rights:
                _introduce(folder, caller, called, rights)
    return home


def _introduce(folder: Path, caller: Member, called: Member, rights: tuple[str, ...]) -> None:
    """A token of its own for this pair: shown to nobody but `called`."""
    token = secrets.token_urlsafe(32)
    may = ", ".join(f'"{right}"' for right in rights)
    _append(
        folder / caller.name / PEERS,
        f'\n[dial."{called.address}"]\nname = "{called.name}"\ntoken = "{token}"\n',
    )
    _append(
        folder / called.name / PEERS,
        f'\n[access."{caller.name}"]\ntoken_sha256 = "{hashed(token)}"\nmay = [{may}]\n',
    )


def _issue(folder: Path, name: str, days: float) -> datetime.datetime:
    """A new key and certificate in `identity.pem`, in one step."""
    home = folder / "authority"
    try:
        authority = x509.load_pem_x509_certificate((home / AUTHORITY).read_bytes())
        signer = serialization.load_pem_private_key((home / _AUTHORITY_KEY).read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the authority in {home}: {error}") from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"expected an elliptic curve key in {home}, got {type(signer).__name__}")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = _key_bytes(key) + certificate.public_bytes(serialization.Encoding.PEM)
    _write(folder / name / IDENTITY, pem)
    return certificate.not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + datetime.timedelta(days=days)) - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    """Replace a file that only its owner can read, all or nothing."""
    try:
        with whole_file(path, mode=0o600) as out:
            out.write(data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _append(path: Path, text: str) -> None:
    _write(path, path.read_bytes() + text.encode())
