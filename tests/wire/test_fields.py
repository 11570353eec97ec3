"""Every field of every message has a rule, and nothing outside of it passes the border."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from kvlink.bounds import ByName, Bytes, Inner, Known, Many, Number, OneOf, Whole, Words
from kvlink.errors import InputError
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2, wire_pb2
from kvlink.wire import checked
from kvlink.wire.fields import BY_THE_SESSION, FIELDS

FILES = (common_pb2, receiver_pb2, sender_pb2, wire_pb2)
MESSAGES: dict[str, Descriptor] = {
    name: kind for file in FILES for name, kind in file.DESCRIPTOR.message_types_by_name.items()
}


def test_every_field_of_every_message_has_a_rule():
    for name, kind in MESSAGES.items():
        if name not in BY_THE_SESSION:
            assert set(FIELDS[name]) == {field.name for field in kind.fields}, name
    assert set(FIELDS) | set(BY_THE_SESSION) == set(MESSAGES)


def fields() -> list[tuple[str, str]]:
    return [(message, field) for message, rules in FIELDS.items() for field in rules]


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@pytest.mark.parametrize(("message", "name"), fields(), ids=".".join)
def test_a_rule_fits_its_field(message, name):
    """No number without ends, no text without length, no list without count; enums and messages of their own kind."""
    field, rule = MESSAGES[message].fields_by_name[name], FIELDS[message][name]
    kinds = {
        FieldDescriptor.CPPTYPE_STRING: (Words, OneOf) if field.type == field.TYPE_STRING else (Bytes,),
        FieldDescriptor.CPPTYPE_MESSAGE: (Inner,),
        FieldDescriptor.CPPTYPE_ENUM: (Known,),
        FieldDescriptor.CPPTYPE_BOOL: (Known,),
        FieldDescriptor.CPPTYPE_DOUBLE: (Number,),
        FieldDescriptor.CPPTYPE_FLOAT: (Number,),
    }
    expected: tuple[type, ...] = kinds.get(field.cpp_type, (Whole,))
    if is_map(field):
        expected = (ByName,)
    elif field.is_repeated:
        assert isinstance(rule, Many)
        if field.message_type is not None or field.enum_type is not None:
            return  # a list of names may have new ones
        rule = rule.each
    assert isinstance(rule, expected)


def wrong_values(field: FieldDescriptor, rule: Any) -> list[Any]:
    """Values that the parser lets through and the rule must not."""
    if isinstance(rule, Many):
        one = {FieldDescriptor.CPPTYPE_STRING: "x" if field.type == field.TYPE_STRING else b"x" * 16}
        many = [one.get(field.cpp_type, 1)] * (rule.most + 1) if rule.most < 100_000 else None
        return [*([many] if many else []), *([value] for value in wrong_values_of(rule.each))]
    if isinstance(rule, ByName):
        inner = wrong_values_of(rule.each)
        return [{"x" * 100: 1}, {'x"}': 1}, {"": 1}, *({rule.names[0]: value} for value in inner)]
    return wrong_values_of(rule)


def wrong_values_of(rule: Any) -> list[Any]:
    if isinstance(rule, Words):
        odd = ["a b\n", "\x1b[2J", "ä"] if rule.like else []
        return ["x" * (rule.most + 1), "世" * (rule.most // 3 + 1), *odd]
    if isinstance(rule, OneOf):
        return ["x" * 1000, "RAW ", "\0"]
    if isinstance(rule, Bytes):
        return [b"x" * (rule.most + 1)] if rule.most else [b"x", b"x" * 15, b"x" * 17, b"x" * 1_000_000]
    if isinstance(rule, Number):
        return [math.nan, math.inf, -math.inf, -1e-9, -1.0, rule.high * 1.01 + 1]
    if isinstance(rule, Whole):
        return [
            *([rule.low - 1] if rule.low != 0 else []),
            *([rule.high + 1] if rule.high < 2**32 - 1 else []),
        ]
    return []


def put(message: Message, name: str, value: Any) -> None:
    if isinstance(value, dict):
        getattr(message, name).update(value)
    elif isinstance(value, list):
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


def lawful(name: str) -> Message:
    """A message whose fields all keep their rules."""
    message = GetMessageClass(MESSAGES[name])()
    for field, rule in FIELDS[name].items():
        if isinstance(rule, Inner) and not MESSAGES[name].fields_by_name[field].containing_oneof:
            getattr(message, field).CopyFrom(lawful(MESSAGES[name].fields_by_name[field].message_type.name))
        elif isinstance(rule, Bytes) and rule.sizes:
            setattr(message, field, b"x" * rule.sizes[-1])
        elif isinstance(rule, Whole) and rule.low > 0:
            setattr(message, field, rule.low)
        elif isinstance(rule, OneOf):
            setattr(message, field, rule.allowed[0])
    if name == "PublishContextResponse":
        message.context_id = "x"
    return message


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("Limits",)])
def test_what_keeps_the_rules_passes(name):
    kind = GetMessageClass(MESSAGES[name])
    message = lawful(name)
    assert checked.read(kind, message.SerializeToString(), InputError) == message


@pytest.mark.parametrize(("message", "name"), fields(), ids=".".join)
def test_what_breaks_a_rule_is_refused_by_the_fields_name(message, name):
    field, rule = MESSAGES[message].fields_by_name[name], FIELDS[message][name]
    if field.message_type is not None and not is_map(field) and not field.is_repeated:
        return  # its own fields are in this list too
    if field.message_type is not None and field.is_repeated and not is_map(field):
        made = lawful(message)
        for _ in range(rule.most + 1):
            getattr(made, name).add()
        with pytest.raises(InputError, match=rf"{name}: expected|fields and entries"):
            checked.read(type(made), made.SerializeToString(), InputError)
        return
    values = (
        [9999, -7] if field.enum_type is not None and not field.is_repeated else wrong_values(field, rule)
    )
    for value in values:
        made = lawful(message)
        made.ClearField(name)
        put(made, name, value)
        with pytest.raises(InputError, match=rf"{name}: expected|{message}: at most") as caught:
            checked.read(type(made), made.SerializeToString(), InputError)
        assert len(str(caught.value)) < 2000


@given(st.sampled_from(sorted(FIELDS)), st.binary(max_size=300))
def test_any_bytes_are_a_message_or_an_error_of_ours(name, data):
    kind = GetMessageClass(MESSAGES[name])
    with contextlib.suppress(InputError):
        checked.check(checked.read(kind, data, InputError), InputError)


CROWDS = {
    "turns": ("PublishContextRequest", b"\x1a\x00" * 9_000_000),
    "readers": ("PublishContextRequest", b"\x22\x00" * 9_000_000),
    "one field again and again": ("GenerateRequest", b"\x18\x01" * 9_000_000),
    "fields that nobody knows": ("DeleteCacheRequest", b"\xf8\x07\x01" * 6_000_000),
    "a group": ("PublishContextRequest", b"\xf3\x07\xf4\x07" + b"\x1a\x00" * 9_000_000),
    "too large": ("DeleteCacheRequest", b"\x0a" + b"\x81\x80\x80\x0a" + b"x" * 20_971_521),
}


@pytest.mark.parametrize("name", CROWDS)
def test_a_message_of_very_many_entries_is_not_even_parsed(name, monkeypatch):
    message, data = CROWDS[name]

    class Kind:
        DESCRIPTOR = MESSAGES[message]

        @staticmethod
        def FromString(_: bytes) -> None:
            raise AssertionError("parsed")

    with pytest.raises(InputError, match="at most"):
        checked.read(Kind, data, InputError)  # type: ignore[type-var]


def test_the_documented_bounds_are_these():
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert checked.table() in text, "docs/security.md: `python scripts/bounds_table.py` prints the table"


def inside(number: int, data: bytes) -> bytes:
    """A field that holds a message of some bytes."""
    head, size = bytes([number << 3 | 2]), len(data)
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + data


NESTED = {
    "modes": ("GetCapabilitiesResponse", inside(1, b"\x28\x01" * 9_000_000)),
    "packed modes": ("GetCapabilitiesResponse", inside(1, inside(5, b"\x01" * 9_000_000))),
    "codecs": ("GetCapabilitiesResponse", inside(1, b"\x32\x00" * 9_000_000)),
    "packed numbers": ("GetCapabilitiesResponse", inside(1, inside(13, inside(2, bytes(19_000_000))))),
    "tokens": ("DeliverCacheResponse", inside(7, b"\x0a\x00" * 2_000_000)),
    "stages": ("DeliverCacheResponse", inside(5, b"\x0a\x00" * 9_000_000)),
    "unknown in a turn": ("PublishContextRequest", inside(3, b"\xfa\x01\x04abcd" * 1_000)),
    "a field twice in a turn": ("PublishContextRequest", inside(3, b"\x12\x01a" * 2)),
    "turns of a frame": ("Frame", inside(2, inside(7, b"\x22\x00" * 1_900_000))),
    "parts of a frame": ("Frame", inside(3, b"\x2a\x00" * 1_900_000)),
}


@pytest.mark.parametrize("name", NESTED)
def test_nor_is_one_with_very_many_entries_inside(name):
    message, data = NESTED[name]
    kind = MESSAGES.get(message, wire_pb2.Frame.DESCRIPTOR)
    with pytest.raises(InputError, match="at most"):
        checked.count(kind, data, InputError)
