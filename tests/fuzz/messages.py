"""Random well-formed messages, made from their descriptors: a field that is new is filled too.

Three kinds: a message of random values; an honest one with one to three fields changed; an honest one.
Values are those at which code breaks: bounds of their type, numbers that are none, texts of control
characters, names outside of an enum, and what honest calls were seen to carry.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.hostile import HOSTILE

LONGEST_BYTES = 15_000_000
"""Of one text or byte string: with the rest of its message below the agents' limit."""

_INT, _LONG = 2**31, 2**63
_NUMBERS = (
    0,
    1,
    2,
    3,
    16,
    255,
    256,
    4096,
    _INT - 1,
    _INT,
    2 * _INT - 1,
    2 * _INT,
    2**53 + 1,
    2**62,
    _LONG - 1,
    _LONG,
)
_FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-3, 1e-320, 5e-324, 2.2e-308, 1e308, -1e308, 1e38, 3.4e39, 1e19, -1e19,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
_TEXTS = (
    *(text for name, text in HOSTILE.items() if not name.startswith(("megabytes", "half"))),
    "", " ", "\n", "\0", "%s%n", "{}{0}", "../../etc/passwd", "\\ud800", "\\x1b[2J", "\ufffd", "é", "e\u0301", "世界",
    "<|im_start|>system\n", "<|im_end|>", "<s>", "</s>", "🙂", "null", "NaN", "1e400", "-1", "[", "=", "@", "=" * 300,
    "int8", "raw", "text", "lossless", "int4", "q2c@0.25 int4", "transform=1", "svd=8 int8", "press:SnapKVPress@0.5",
    "127.0.0.1:1", "[::1]:1", "localhost:0", "127.0.0.1:99999", "kvlink://127.0.0.1:1/x", "user", "assistant", "system",
)  # fmt: skip
_NUMBER = re.compile(r"\d+(\.\d+)?")
_WORDS = ("0", "-1", "00", "1e400", "nan", "inf", "9" * 400, "0x1", "²", "1_0", "0.0000001", "4294967296", "")
_SIGNED = {FieldDescriptor.CPPTYPE_INT32: _INT, FieldDescriptor.CPPTYPE_INT64: _LONG}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32: 2 * _INT, FieldDescriptor.CPPTYPE_UINT64: 2 * _LONG}


_MOST_BYTES = 30_000_000
"""Of a repeated field; more than any agent takes in a message."""


class Seen:
    """Values of fields that real messages carried, by the field's name: the newest few of each."""

    def __init__(self, keep: int = 32) -> None:
        self._values: dict[str, deque[Any]] = defaultdict(lambda: deque(maxlen=keep))

    def note(self, message: Message) -> None:
        """Remember every text, byte string and number of a message, to its depth."""
        for field, value in message.ListFields():
            for item in value if field.is_repeated else (value,):
                if isinstance(item, Message):
                    self.note(item)
                elif not isinstance(item, str | bytes) or len(item) <= 4096:
                    self.add(field.name, item)

    def add(self, name: str, value: Any) -> None:
        if value not in self._values[name]:
            self._values[name].append(value)

    def forget(self, name: str, value: Any) -> None:
        if value in self._values[name]:
            self._values[name].remove(value)

    def pick(self, rng: random.Random, name: str, kind: type) -> Any:
        """A value of that name, or of any name, of one Python type; None where none was seen."""
        values = [v for v in self._values.get(name, ()) if isinstance(v, kind)]
        if not values or rng.random() < 0.1:
            values = [v for many in self._values.values() for v in many if isinstance(v, kind)] or values
        return rng.choice(values) if values else None


class Maker:
    """Makes messages from one source of chance and what was seen."""

    def __init__(self, rng: random.Random, seen: Seen) -> None:
        self.rng, self.seen = rng, seen

    def message(self, descriptor: Descriptor, depth: int = 0) -> Any:
        """A message of random values: each field absent, or set, whichever it is."""
        made = GetMessageClass(descriptor)()
        share = 0.9 if depth > 3 else self.rng.choice((0.2, 0.6, 0.9))  # deep ones are rare enough
        chosen = {self.rng.choice(one.fields).full_name for one in descriptor.oneofs}
        for field in descriptor.fields:
            allowed = field.containing_oneof is None or field.full_name in chosen
            if allowed and self.rng.random() < share:
                self.fill(made, field, depth)
        return made

    def fill(self, message: Any, field: FieldDescriptor, depth: int = 0) -> None:
        """Give one field a random value; a repeated one some, now and then many."""
        rng = self.rng
        if not field.is_repeated:
            if field.message_type:
                if depth < 10:
                    getattr(message, field.name).CopyFrom(self.message(field.message_type, depth + 1))
                    getattr(message, field.name).SetInParent()
            else:
                setattr(message, field.name, self.value(field))
            return
        message.ClearField(field.name)
        many = getattr(message, field.name)
        count = rng.choice((0, 1, 1, 2, 3, 8, 17)) if rng.random() > 0.01 else rng.choice((300, 5_000))
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            for _ in range(count):
                if value.message_type:
                    many[self.value(key)].CopyFrom(self.message(value.message_type, depth + 1))
                else:
                    many[self.value(key)] = self.value(value)
        elif field.message_type:
            one = (
                [self.message(field.message_type, depth + 1) for _ in range(min(count, 3))]
                if depth < 10
                else []
            )
            largest = max((inner.ByteSize() for inner in one), default=0)
            count = min(
                count, 1 + _MOST_BYTES // max(1, largest)
            )  # thousands of megabytes are nobody's message
            many.extend(rng.choice(one) for _ in range(count) if one)
        else:
            one = [self.value(field) for _ in range(min(count, 17))]
            if sum(len(v) for v in one if isinstance(v, str | bytes)) > 10_000:
                count = 1
            many.extend(rng.choice(one) for _ in range(count))

    def value(self, field: FieldDescriptor) -> Any:
        """A value of a field that is no message."""
        rng, kind = self.rng, field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            known = [value.number for value in field.enum_type.values]
            return (
                rng.choice(known)
                if rng.random() < 0.6
                else rng.choice((-1, 99, _INT - 1, -_INT, max(known) + 1))
            )
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return rng.choice(_FLOATS) if rng.random() < 0.7 else rng.uniform(-4, 4)
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return (
                self._bytes(field.name)
                if field.type == FieldDescriptor.TYPE_BYTES
                else self._text(field.name)
            )
        return self._number(field)

    def _number(self, field: FieldDescriptor) -> int:
        rng = self.rng
        low, high = 0, _UNSIGNED.get(field.cpp_type, 0) - 1
        if field.cpp_type in _SIGNED:
            low, high = -_SIGNED[field.cpp_type], _SIGNED[field.cpp_type] - 1
        draw = rng.random()
        found = self.seen.pick(rng, field.name, int) if draw < 0.3 else None
        if found is None:
            found = rng.choice(_NUMBERS) * rng.choice((1, 1, -1)) if draw < 0.8 else rng.randint(0, 300)
        return min(max(int(found), low), high)

    def _text(self, name: str) -> str:
        rng, draw = self.rng, self.rng.random()
        seen = self.seen.pick(rng, name, str)
        if draw < 0.35 and seen is not None:
            return str(seen)
        if draw < 0.6 and seen is not None:
            return self.misspelt(str(seen))
        if draw < 0.995:
            return rng.choice(_TEXTS) if draw < 0.9 else "".join(rng.choices(_TEXTS, k=rng.randint(2, 6)))
        return rng.choice(("a", "word ", "世界", "\x1b[2J", "1", "[[", "q2c@0.5 ")) * (self._length() // 8)

    def misspelt(self, text: str) -> str:
        """A known text with one slip: a number replaced, a letter lost, doubled or foreign, a piece moved."""
        rng = self.rng
        numbers = list(_NUMBER.finditer(text))
        if numbers and rng.random() < 0.5:
            one = rng.choice(numbers)
            return text[: one.start()] + rng.choice(_WORDS) + text[one.end() :]
        at = rng.randint(0, len(text))
        return rng.choice((
            text[:at] + text[at + 1 :], text[:at] + text[at : at + 1] + text[at:], text[at:] + text[:at],
            text[:at] + rng.choice(_TEXTS) + text[at:], text[:at], text + text, text.swapcase(),
        ))  # fmt: skip

    def _bytes(self, name: str) -> bytes:
        rng, draw = self.rng, self.rng.random()
        seen = self.seen.pick(rng, name, bytes)
        if draw < 0.5 and seen is not None:
            return self.damaged(seen) if draw < 0.2 else bytes(seen)
        if draw < 0.99:
            return rng.randbytes(rng.choice((0, 1, 15, 16, 16, 16, 17, 32, 33, 300)))
        return rng.choice((b"\0", b"\xff", b"\x1b[2J", rng.randbytes(64))) * (self._length() // 64)

    def damaged(self, data: bytes) -> bytes:
        """Bytes with one slip."""
        rng = self.rng
        if not data:
            return rng.randbytes(4)
        at, changed = rng.randrange(len(data)), bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            end = min(len(changed), at + rng.randint(1, 40))
            changed[at:end] = rng.randbytes(end - at)
        elif kind == 2:
            changed[at] = rng.choice((0, 1, 127, 128, 255))
        else:
            del changed[at : at + rng.randint(1, 40)]
        return bytes(changed)

    def _length(self) -> int:
        """A length in bytes: mostly thousands, seldom millions."""
        rng = self.rng
        return int(10 ** rng.uniform(3.5, 5.5)) if rng.random() < 0.95 else rng.randint(10**6, LONGEST_BYTES)

    def changed(self, message: Any, times: int = 0) -> Any:
        """A copy of an honest message with one to three fields changed, at any depth."""
        made = type(message)()
        made.CopyFrom(message)
        for _ in range(times or self.rng.choice((1, 1, 2, 3))):
            self._change(made)
        return made

    def _change(self, message: Any) -> None:
        rng = self.rng
        owner, field = rng.choice(list(_fields(message)) or [(message, None)])
        if field is None:
            return
        if field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry):
            many = getattr(owner, field.name)
            if len(many) and rng.random() < 0.7:
                at, kind = rng.randrange(len(many)), rng.randrange(4)
                items = list(many)
                if kind == 0:
                    del items[at]
                elif kind == 1:
                    items.insert(at, items[at])
                elif kind == 2:
                    items.reverse()
                else:
                    items[at] = self.message(field.message_type) if field.message_type else self.value(field)
                owner.ClearField(field.name)
                getattr(owner, field.name).extend(items)
                return
        if rng.random() < 0.15:
            owner.ClearField(field.name)
        else:
            self.fill(owner, field)


def _fields(message: Any) -> Iterator[tuple[Any, FieldDescriptor]]:
    """Every field of a message and of the messages in it that are set."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type and not field.message_type.GetOptions().map_entry:
            if field.is_repeated:
                items = list(getattr(message, field.name))[:4]
            else:
                items = [getattr(message, field.name)] if message.HasField(field.name) else []
            for item in items:
                yield from _fields(item)
