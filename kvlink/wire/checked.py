"""Messages of peers: bounded, parsed and checked against the table of fields, in one step.

Does not know: what a message is for. Place on the path: the border itself.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from kvlink.bounds import MESSAGE, Many
from kvlink.errors import KvlinkError
from kvlink.wire.fields import FIELDS

M = TypeVar("M", bound=Message)


def read(kind: type[M], data: bytes, raised: type[KvlinkError]) -> M:
    """The message that `data` is. Raises `raised` where it is none, too large, or a field is out of range."""
    name = kind.DESCRIPTOR.name
    if len(data) > MESSAGE.most:
        raise raised(f"{name}: {MESSAGE}, found {len(data):,}")
    most = _most_fields(name)
    if _fields(data, most + 1) > most:
        raise raised(f"{name}: at most {most:,} fields and entries, found more")
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
        if not what and field.enum_type is not None and value not in field.enum_type.values_by_number:
            rule, what = f"one of {', '.join(field.enum_type.values_by_name)}", str(value)  # type: ignore[assignment]
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


def _most_fields(name: str) -> int:
    """Entries that the bytes of a message may have at its top: parsing more would cost more than it is worth."""
    rules = FIELDS[name].values()
    lists = sum(rule.most for rule in rules if isinstance(rule, Many))
    return 64 + 2 * len(rules) + lists


def _fields(data: bytes, most: int) -> int:
    """How many fields the bytes of a message have at its top, counted to `most`."""
    at = count = 0
    size = len(data)
    while at < size and count < most:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return most  # a group: no message of ours has one, and what is in it cannot be counted
        count += 1
    return count


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


if __name__ == "__main__":
    print(table())
