"""Frozen values to protobuf messages and back, by the names of their fields.

A value's fields are those of its message: numbers and flags as they are, words of a closed set as an
enum (`"after"` is `WHEN_AFTER`), values within values, tuples as repeated fields, None as an
absent one. A codec is the one of the proto's `Codec` that has its name. So a new option of a codec is a
field here and there, and no code between.

Does not know: what the fields mean; the values check themselves. Place on the path: under `messages`.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from google.protobuf.message import Message

from kvlink.codecs import CODECS, Codec, name_of
from kvlink.errors import KvlinkError, RemoteProtocolError


def write(value: Any, message: Message) -> None:
    """Fill `message` with the fields of `value`."""
    if isinstance(value, Codec) and _is_union(message):
        kind = getattr(message, name_of(value))
        kind.SetInParent()  # all of its fields may be zeros
        write(value, kind)
        return
    descriptors = message.DESCRIPTOR.fields_by_name
    for field in fields(value):
        found, descriptor = getattr(value, field.name), descriptors[field.name]
        if isinstance(found, tuple):
            for item in found:
                write(item, getattr(message, field.name).add())
        elif is_dataclass(found):
            getattr(message, field.name).SetInParent()
            write(found, getattr(message, field.name))
        elif descriptor.enum_type is not None:
            setattr(message, field.name, number(descriptor.enum_type, found))
        elif found is not None:
            setattr(message, field.name, found)


def read(message: Message, kind: type) -> Any:
    """The value of class `kind` that `message` holds.

    Raises RemoteProtocolError, naming the field, for what is missing or not of its set, and what the
    value itself raises.
    """
    if kind is Codec:
        name = message.WhichOneof("kind")
        if name is None:
            raise RemoteProtocolError("codec: none is given, or one that is not known here")
        return read(getattr(message, name), CODECS[name])
    found: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        try:
            found[name] = _read_field(message, descriptor, hint)
        except KvlinkError as error:
            raise type(error)(f"{name}: {error}") from error
    return kind(**found)


def _read_field(message: Message, descriptor: Any, hint: Any) -> Any:
    value = getattr(message, descriptor.name)
    if typing.get_origin(hint) is tuple:
        return tuple(read(item, typing.get_args(hint)[0]) for item in value)
    if isinstance(hint, types.UnionType):
        if not message.HasField(descriptor.name):
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if descriptor.message_type is not None:
        if not message.HasField(descriptor.name):
            raise RemoteProtocolError(f"missing in {message.DESCRIPTOR.name}")
        return read(value, hint)
    return word(descriptor.enum_type, value) if descriptor.enum_type is not None else value


def _is_union(message: Message) -> bool:
    return message.DESCRIPTOR.name == "Codec"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    told = typing.get_type_hints(kind)
    return {field.name: told[field.name] for field in fields(kind)}


def _prefix(enum: Any) -> str:
    return str(enum.values_by_number[0].name.removesuffix("UNSPECIFIED"))


def number(enum: Any, word: str) -> int:
    """The enum's value that has this word."""
    return int(enum.values_by_name[_prefix(enum) + word.upper()].number)


def word(enum: Any, number: int) -> str:
    """The word of an enum's value.

    Raises RemoteProtocolError where it has none that is known here.
    """
    known = enum.values_by_number.get(number)
    if known is None or number == 0:
        raise RemoteProtocolError(f"{enum.name} {number} is not known here")
    return str(known.name.removeprefix(_prefix(enum)).lower())
