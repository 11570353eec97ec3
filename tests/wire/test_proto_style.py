"""The proto keeps the rules of `proto/buf.yaml` as far as its descriptors show them: names, enums, requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor, MethodDescriptor

from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2, wire_pb2

FILES: list[FileDescriptor] = [file.DESCRIPTOR for file in (common_pb2, receiver_pb2, sender_pb2, wire_pb2)]
SNAKE, PASCAL = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*"), re.compile(r"([A-Z][a-z0-9]*)+")
SHARED = {"GetCapabilities"}
"""Methods of both services, with one request and one response."""


def messages() -> Iterator[Descriptor]:
    for file in FILES:
        yield from file.message_types_by_name.values()


def enums() -> Iterator[EnumDescriptor]:
    for file in FILES:
        yield from file.enum_types_by_name.values()


def methods() -> list[MethodDescriptor]:
    return [
        method for file in FILES for service in file.services_by_name.values() for method in service.methods
    ]


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.full_name)
def test_a_method_has_a_request_and_a_response_of_its_own(method):
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


def test_no_two_methods_share_them():
    names = [kind.name for m in methods() if m.name not in SHARED for kind in (m.input_type, m.output_type)]
    assert len(names) == len(set(names))


def test_services_and_packages_are_named_as_such():
    for file in FILES:
        assert file.package == "kvlink.v1"
        assert file.name.startswith("kvlink/v1/")
        assert all(name.endswith("Service") for name in file.services_by_name)


def test_messages_fields_and_choices_are_in_their_case():
    for message in messages():
        assert PASCAL.fullmatch(message.name), message.name
        for field in message.fields:
            assert SNAKE.fullmatch(field.name), field.full_name
        for choice in message.oneofs:
            assert SNAKE.fullmatch(choice.name), choice.full_name


def test_values_of_enums_begin_with_its_name_and_zero_says_nothing():
    for enum in enums():
        prefix = upper_snake(enum.name)
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(name.startswith(f"{prefix}_") for name in enum.values_by_name), enum.name
        assert not enum.GetOptions().allow_alias


def test_only_what_is_written_there_is_excepted():
    told = (Path(__file__).parents[2] / "proto" / "buf.yaml").read_text(encoding="utf-8")
    assert re.findall(r"- ([A-Z_]+)", told) == ["RPC_REQUEST_RESPONSE_UNIQUE", "IMPORT_NO_PUBLIC"]
