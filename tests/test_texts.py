"""Texts as people hand them over: whatever the bytes, a text of whole characters or one error that names them."""

from __future__ import annotations

import gzip
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlink.errors import ConfigError, ContextError
from kvlink.texts import half_character, read_bytes, read_text, read_toml, whole
from kvlink.transport import certs, convert
from kvlink.transport.credentials import Credentials
from kvlink.v1 import receiver_pb2, sender_pb2

ANY = st.text(st.characters(codec=None), max_size=60)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_a_text_comes_back_from_every_encoding_that_marks_itself(tmp_path, encoding, text):
    path = tmp_path / "text"
    path.write_bytes(text.encode(encoding))
    if encoding == "utf-8" and (text.startswith("\ufeff") or "\0" in text[:4]):
        return  # it looks like another encoding
    assert read_text(path, "the text", 1000) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.binary(max_size=60) | st.binary(max_size=20).map(lambda b: b"\x1f\x8b" + b))
def test_any_bytes_are_a_text_or_one_error_that_names_the_file(tmp_path, data):
    path = tmp_path / "any"
    path.write_bytes(data)
    try:
        text = read_text(path, "the text", 1000)
    except ContextError as error:
        text = str(error)
    text.encode()


@given(ANY)
def test_halves_of_characters_are_found_wherever_they_are(text):
    at = half_character(text)
    if at < 0:
        assert whole(text, "the question").encode().decode() == text
        return
    assert "\ud800" <= text[at] <= "\udfff"
    text[:at].encode()
    with pytest.raises(ContextError, match="the question is not whole: half a character at"):
        whole(text, "the question")


def test_a_file_is_bounded_packed_or_not(tmp_path):
    path = tmp_path / "x"
    for data in (b"x" * 101, gzip.compress(b"x" * 101)):
        path.write_bytes(data)
        with pytest.raises(ContextError, match="the text .*x has more than 100 bytes"):
            read_bytes(path, "the text", 100)
    with pytest.raises(ContextError, match="/dev/zero has more than 100 bytes"):
        read_bytes("/dev/zero", "the text", 100)


@pytest.mark.parametrize(
    ("kind", "fields", "error", "message"),
    [
        (receiver_pb2.GenerateRequest, {"question": "a\udce9"}, ContextError, "the question is not whole"),
        (
            receiver_pb2.GenerateRequest,
            {"max_new_tokens": 2**40},
            ConfigError,
            "the max new tokens cannot be sent",
        ),
        (
            receiver_pb2.GenerateRequest,
            {"max_new_tokens": -1},
            ConfigError,
            "the max new tokens cannot be sent",
        ),
        (sender_pb2.PublishContextRequest, {"text": "\ud83c"}, ContextError, "the text is not whole"),
        (
            sender_pb2.PublishContextRequest,
            {"text": "x", "readers": ["a\udce9"]},
            ConfigError,
            "the readers cannot",
        ),
        (
            sender_pb2.PublishContextRequest,
            {"lifetime_s": 2**70},
            ConfigError,
            "the lifetime s cannot be sent",
        ),
    ],
)
def test_what_no_message_can_hold_is_refused_by_the_name_of_its_field(kind, fields, error, message):
    with pytest.raises(error, match=message):
        convert.request(kind, **fields)


@pytest.mark.parametrize("data", [b"a = 1\r\n", b"\xef\xbb\xbfa = 1\n", "a = 1\n".encode("utf-16")])
def test_a_configuration_is_read_as_editors_write_it(tmp_path, data):
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    assert read_toml(path, "the configuration") == {"a": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = ", "Invalid value"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "limit"),
        (b"a = '\xff'", "not UTF-8"),
        (b"x" * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"x.toml.*{message}"):
        read_toml(path, "the configuration")


@pytest.mark.parametrize(
    "text", ["a = [", 'kind = "sender"', "name = 7", 'name = "a"\nkind = "king"', "x = " + "[" * 90_000]
)
def test_a_network_with_a_damaged_peer_is_refused_by_the_name_of_the_file(tmp_path, text):
    certs.begin(tmp_path / "net", [certs.Member("a", "client")])
    (tmp_path / "net" / "a" / certs.PEERS).write_text(text)
    for work in (certs.renew, lambda folder: certs.add(folder, certs.Member("b", "client"))):
        with pytest.raises(ConfigError, match=r"a/peers\.toml"):
            work(tmp_path / "net")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('may = ["look"', 'may = ["lok"', "there is no right 'lok'; known: deliver, fetch"),
        ('may = ["look"', 'may = [["look"]', "there is no right ['look']"),
        ('may = ["look"]', 'may = "look"', "may must be a list, got 'look'"),
        ("[access.", "[acess.", "nothing reads 'acess'; known: name, kind, address, dial, access"),
        ("may = ", 'until = "noon"\nmay = ', "nothing reads 'until'; known: token_sha256, may"),
        ('token_sha256 = "', 'token_sha256 = "\u00e9', "64 hexadecimal digits"),
        ("token_sha256 = ", "token = ", "nothing reads 'token'"),
        ("may = ", "dial = 1\nmay = ", "nothing reads 'dial'"),
    ],
)
def test_a_line_about_peers_that_would_stand_there_in_vain_is_refused(tmp_path, before, after, message):
    certs.begin(tmp_path, [certs.Member("a", "receiver", "127.0.0.1:1"), certs.Member("b", "client")])
    peers = tmp_path / "a" / certs.PEERS
    text = peers.read_text()
    assert before in text, text
    peers.write_text(text.replace(before, after, 1))
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        Credentials(tmp_path / "a")
    assert certs.PEERS in str(refused.value)
