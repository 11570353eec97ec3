"""Addresses: `host:port` and `[v6]:port`, read and printed in this one place.

An address is read before anything is dialled, bound or loaded. It has one spelling after that: a host in
small letters, an IPv6 host compressed and in brackets, a port in plain digits.

Does not know: connections. Place on the path: in front of every dial, listen, handle and peer list.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from dataclasses import dataclass

from kvlink.errors import AccessError, ConfigError

_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_NUMBERS = re.compile(r"[0-9.]+|0[xX][0-9a-fA-F]*")
_SCHEMES = frozenset({"unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds", "google-c2p"})
"""Before a colon gRPC reads these as another kind of address."""
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Address:
    """Where an agent listens. `host`: a name, an IPv4 or (without brackets) an IPv6 address.

    Port 0 asks the system for a free one: it can be listened on, not dialled.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, listening: bool = False) -> Address:
        """Raises ConfigError, which shows the right form where it can be guessed."""
        host, mark, port = text.rpartition(":")
        if len(text) > _LONGEST or not mark or not host or not _PORT.fullmatch(port):
            raise _refusal(text)
        bracketed = host.startswith("[") and host.endswith("]")
        if not bracketed and ":" in host:
            raise _refusal(text)
        found = _v6(host[1:-1]) if bracketed else _v4_or_name(host)
        if not found or int(port) > 65535:
            raise _refusal(text)
        if not int(port) and not listening:
            raise ConfigError(f"{text!r}: nobody listens on port 0; expected the port that the agent says")
        return cls(found, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_any(self) -> bool:
        """Whether it stands for every address of a machine: it can be listened on, not dialled."""
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return (getattr(found, "ipv4_mapped", None) or found).is_unspecified

    def matches(self, pattern: str) -> bool:
        """Whether a peer list's entry means it. `*` and `?` stand for any letters; brackets are brackets."""
        return fnmatch.fnmatchcase(str(self), pattern.lower().replace("[", "[[]"))

    def check_open(self, insecure: bool, doing: str = "listen on") -> None:
        """Raise AccessError where it is off loopback, unless told `insecure` in so many words."""
        if not insecure and not self.is_loopback:
            raise AccessError(
                f"refusing to {doing} {self} without encryption: a KV cache reveals the text it was made "
                "from; give --credentials (see 'kvlink certs init'), or --insecure if the network is yours alone"
            )


def check_advertised(text: str) -> str:
    """What an agent says that others reach it by, in its one spelling; empty where it says nothing.

    Raises ConfigError where nobody could dial it.
    """
    if not text:
        return ""
    found = Address.parse(text)
    if found.is_any:
        raise ConfigError(
            f"{text!r} is every address of a machine, nobody can dial it: name one that others reach"
        )
    return str(found)


def check_pattern(text: str) -> str:
    """An entry of a peer list, as it was given. Raises ConfigError where no address could match it."""
    if not set("*?") & set(text):
        return str(Address.parse(text))
    host, mark, port = text.rpartition(":")
    if not mark or not host or not re.fullmatch(r"[0-9*?]+", port) or (":" in host and host[0] != "["):
        raise ConfigError(f"expected host:port, with * for any letters, in a peer list, got {text!r}")
    return text


def _v6(host: str) -> str:
    try:
        return ipaddress.IPv6Address(host).compressed
    except ValueError:
        return ""


def _v4_or_name(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        # What has digits and dots only would be read by some resolvers as a short or octal address.
        numbers = _NUMBERS.fullmatch(host.rpartition(".")[2] or host)
        fit = _NAME.fullmatch(host) and len(host) < 254 and host.lower() not in _SCHEMES
        return host.lower() if fit and not numbers else ""


def _refusal(text: str) -> ConfigError:
    """What was expected; with the brackets in place where an IPv6 address lacks them."""
    hint = ""
    host, _, port = text.rpartition(":")
    bare = host.strip("[]")
    if len(text) <= _LONGEST and ":" in text and host != f"[{bare}]" and _PORT.fullmatch(port) and _v6(bare):
        hint = f"; an IPv6 address stands in brackets: [{bare}]:{port}"
    elif len(text) <= _LONGEST and _v6(text.strip("[]")):
        hint = f"; an IPv6 address stands in brackets, with a port: [{text.strip('[]')}]:50051"
    return ConfigError(f"expected an address as host:port, with a port of 1 to 65535, got {text!r}{hint}")
