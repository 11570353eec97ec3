"""Messages of peers: bounded, parsed and checked against the table of fields, in one step.

Does not know: what a message is for. Place on the path: the border itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from kvlink.bounds import MESSAGE, PARTS, ByName, Many
from kvlink.errors import KvlinkError
from kvlink.wire.fields import FIELDS

M = TypeVar("M", bound=Message)


def read(kind: type[M], data: bytes, raised: type[KvlinkError]) -> M:
    """The message that `data` is. Raises `raised` where it is none, too large, or a field is out of range."""
    name = kind.DESCRIPTOR.name
    if len(data) > MESSAGE.most:
        raise raised(f"{name}: {MESSAGE}, found {len(data):,}")
    count(kind.DESCRIPTOR, data, raised)
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise raised(f"expected a {name}, found {len(data):,} bytes that are none") from None
    check(message, raised)
    return message


def check(message: Message, raised: type[KvlinkError], path: str = "") -> None:
    """Raise `raised`, naming the field, where a message or one inside it has what no field may have."""
    path = path or message.DESCRIPTOR.name
    for name, rule in FIELDS[message.DESCRIPTOR.name].items():
        field = message.DESCRIPTOR.fields_by_name[name]
        value: Any = getattr(message, name)
        what = rule.wrong(value)
        known = None if field.enum_type is None or field.is_repeated else field.enum_type.values_by_number
        if not what and known is not None and value not in known:
            rule, what = f"one of {', '.join(one.name for one in known.values())}", str(value)  # type: ignore[assignment]
        if what:
            raise raised(f"{path}.{name}: expected {rule}, found {what}")
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry:
            continue
        if field.is_repeated:
            for number, item in enumerate(value):
                check(item, raised, f"{path}.{name}[{number}]")
        elif message.HasField(name):
            check(value, raised, f"{path}.{name}")


def count(kind: Any, data: bytes, raised: type[KvlinkError]) -> None:
    """Raise `raised` where the bytes of a message hold more than it can say, without parsing them: in it or
    in a message inside it too long a list, one field twice, or much that this release does not know.

    Parsed, such bytes would take many times their size, or be kept by whoever keeps the message as it came.
    """
    what = _Walk(data).message(kind, 0, len(data), kind.name)
    if what:
        raise raised(what)


class _Walk:
    """One pass over the bytes of a message."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._unknown_bytes = 0

    def message(self, kind: Descriptor, at: int, end: int, path: str) -> str:
        """What is wrong with the message from `at` to `end`; empty where nothing is, or the parser will say."""
        known, found = _known(kind), dict[int, int]()
        while at < end:
            began = at
            tag, at = _varint(self._data, at)
            length = 0
            if tag & 7 == 0:
                _, at = _varint(self._data, at)
            elif tag & 7 == 2:
                length, at = _varint(self._data, at)
                at += length
            elif tag & 7 in (1, 5):
                at += 8 if tag & 7 == 1 else 4
            else:  # a group: no message of ours has one, and what is in it cannot be counted
                return f"{path}: at most fields of known kinds, found a group"
            field = known.get(tag >> 3)
            if field is None:
                self._unknown_bytes += at - began
                if self._unknown_bytes > _MOST_UNKNOWN_BYTES:
                    return f"{path}: at most {_MOST_UNKNOWN_BYTES:,} bytes of unknown fields, found more"
                continue
            packed = tag & 7 == 2 and field.is_packed
            entries = found[tag >> 3] = found.get(tag >> 3, 0) + (max(1, length // 10) if packed else 1)
            if entries > field.most:
                return f"{path}.{field.name}: expected at most {field.most:,} entries, found more"
            inner = field.inner if tag & 7 == 2 else None
            if inner is None:
                continue
            what = self.message(inner, at - length, min(at, end), f"{path}.{field.name}")
            if what:
                return what
        return ""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    most: int
    inner: Descriptor | None
    is_packed: bool


@cache
def _known(kind: Descriptor) -> dict[int, _Field]:
    """The fields of a message by number, with how often each may stand there."""
    return {
        field.number: _Field(
            field.name,
            _most(kind.name, field.name) if field.is_repeated else 1,
            field.message_type,
            field.is_repeated and field.message_type is None and field.type not in _NEVER_PACKED,
        )
        for field in kind.fields
    }


_NEVER_PACKED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_MOST_UNKNOWN_BYTES = 1024
"""Of what a later release may have added to a message."""


def _most(kind: str, name: str) -> int:
    rule = FIELDS.get(kind, {}).get(name)
    if isinstance(rule, ByName):
        return len(rule.names)
    return rule.most if isinstance(rule, Many) else PARTS.most


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            break
        shift += 7
    return value, at


def table() -> str:
    """The bounds as a table in Markdown, for the documentation: fields that share a rule share a line."""
    lines: dict[str, list[str]] = {}
    for message, rules in FIELDS.items():
        for name, rule in rules.items():
            lines.setdefault(str(rule), []).append(f"`{message}.{name}`")
    shown = [f"| {rule} | {', '.join(names)} |" for rule, names in lines.items() if rule not in _SILENT]
    return "\n".join(["| taken | field |", "|---|---|", *shown])


_SILENT = ("a message", "a value that is known")
