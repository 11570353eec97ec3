"""Addresses as people write them: one spelling of each, and everything else refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.errors import AccessError, ConfigError
from kvlink.transport.address import Address, check_pattern

GOOD = {
    "127.0.0.1:1": ("127.0.0.1", 1),
    "localhost:65535": ("localhost", 65535),
    "Receiver.Example.ORG:50051": ("receiver.example.org", 50051),
    "kvlink_receiver-1:80": ("kvlink_receiver-1", 80),
    "4gents:1": ("4gents", 1),
    "[::1]:50052": ("::1", 50052),
    "[2001:DB8:0:0::1]:1": ("2001:db8::1", 1),
    "[fe80::1%eth0]:1": ("fe80::1%eth0", 1),
}


@pytest.mark.parametrize("text", GOOD)
def test_an_address_has_a_host_and_a_port(text):
    found = Address.parse(text)
    assert (found.host, found.port) == GOOD[text]
    assert Address.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "host", "host:", ":1", "host:port", "host:0x1", "host:99999", "host:65536", "host:-1", "host:+1",
        "host:1 ", " host:1", "ho st:1", "host:1\n", "host\x00:1", "host:1_0", "host:000001",
        "127.0.0.1:\u00b2", "127.0.0.1:5005\u00b2", "127.0.0.1:\u0665\u0660", "127.0.0.1:\u096b", "127.0.0.1:\uff11",
        "\uff11\uff12\uff17.0.0.1:1", "127.0.0.\u00b9:1", "127.1:1", "0177.0.0.1:1", "1.2.3.4.5:1", "256.1.1.1:1",
        "2130706433:1", "0x7f000001:1", "h\u00f6st:1", "-host:1", "host-:1", "a..b:1", ".:1", f"{'a' * 64}:1",
        "unix:/tmp/socket", "unix:1", "DNS:1", "ipv4:1", "vsock:1",
        "http://host:1", "dns:///host:1", "user@host:1", "host/path:1", "host:1/path",
        "[]:1", "[host]:1", "[127.0.0.1]:1", "[::1:1", "::1]:1", "[[::1]]:1", "[::1]", "[::1] :1",
        "[:::]:1", "x" * 5000 + ":1",
    ],
)  # fmt: skip
def test_anything_else_is_no_address(text):
    with pytest.raises(ConfigError, match="expected an address as host:port"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("::1:50052", "[::1]:50052"),
        ("2001:db8::7:1", "[2001:db8::7]:1"),
        ("::1", "[::1]:"),
        ("fe80::1%lo:80", "[fe80::1%lo]:80"),
    ],
)
def test_without_brackets_the_right_form_is_shown(text, shown):
    with pytest.raises(ConfigError) as caught:
        Address.parse(text)
    assert shown in str(caught.value)


def test_port_0_can_be_listened_on_and_not_dialled():
    assert Address.parse("127.0.0.1:0", listening=True).port == 0
    with pytest.raises(ConfigError, match="port 0"):
        Address.parse("127.0.0.1:0")


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    try:
        found = Address.parse(text)
    except ConfigError:
        return
    assert found.host.isascii()
    assert 1 <= found.port <= 65535
    assert Address.parse(str(found)) == found


@pytest.mark.parametrize("text", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.9.1:1"])
def test_loopback_is_open(text):
    Address.parse(text).check_open(insecure=False)


@pytest.mark.parametrize(
    "text", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.example:1", "[2001:db8::1]:1"]
)
def test_everything_else_is_open_only_when_told(text):
    with pytest.raises(AccessError, match="--insecure"):
        Address.parse(text).check_open(insecure=False, doing="dial")
    Address.parse(text).check_open(insecure=True)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("[::1]:*", "[0:0:0:0:0:0:0:1]:5", "[::2]:5"),
        ("10.0.0.*:50052", "10.0.0.9:50052", "10.0.1.9:50052"),
        ("Reader:1", "reader:1", "reader2:1"),
        ("reader-?:1", "reader-1:1", "reader-12:1"),
        ("[2001:db8::*]:1", "[2001:db8::f]:1", "[2001:db9::f]:1"),
    ],
)
def test_peer_lists_name_addresses_with_stars(pattern, yes, no):
    check_pattern(pattern)
    assert Address.parse(yes).matches(pattern)
    assert not Address.parse(no).matches(pattern)


@pytest.mark.parametrize("pattern", ["::1:50052", "reader", "10.0.0.*", "*:x", "10.0.0.1:\u00b2", "::*:1"])
def test_a_peer_list_that_nothing_could_match_is_refused(pattern):
    with pytest.raises(ConfigError):
        check_pattern(pattern)
