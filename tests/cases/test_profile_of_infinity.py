"""A profile whose quality is [[1e400, 1]]: a peer's call ended as an internal error, and a model's folder with such a
profile made every command die with a traceback."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from kvlink.model.loading import embedded_folder
from tests.cases.peer import ended
from tests.command import CONTEXT, kvlink
from tests.fuzz.honest import in_pieces

GOOD = (embedded_folder() / "kvlink.profile").read_bytes()
WRONG = {
    "1e400": {"quality": "[[1e400,1]]"},
    "-1e400": {"quality": "[[-1e400,1]]"},
    "Infinity": {"quality": "[[Infinity,1]]"},
    "NaN": {"quality": "[[NaN,1]]"},
    "layers of 5,000 digits": {"layers": "9" * 5000},
    "a deep list": {"about": "[" * 100_000},
}


def changed(fields: dict[str, str]) -> bytes:
    """The good profile with other fields in its head."""
    (size,) = struct.unpack_from("<Q", GOOD)
    head = json.loads(GOOD[8 : 8 + size])
    told = json.loads(head["__metadata__"]["kvlink"]) | fields
    head["__metadata__"]["kvlink"] = json.dumps(told, sort_keys=True)
    packed = json.dumps(head).encode()
    packed += b" " * (-len(packed) % 8)
    return struct.pack("<Q", len(packed)) + packed + GOOD[8 + size :]


def test_the_good_profile_is_taken(source):
    assert ended(lambda: source.call("PutProfile", *in_pieces(GOOD)))[0] == "OK"


@pytest.mark.parametrize("name", WRONG)
def test_a_profile_with_odd_numbers_is_none(network, source, name):
    before = network.receiver.said()
    status, why = ended(lambda: source.call("PutProfile", *in_pieces(changed(WRONG[name]))))
    assert status in ("DATA_LOSS", "INVALID_ARGUMENT"), why
    assert "checksum" not in why, "the number is what is wrong"
    assert "Traceback" not in network.receiver.said()[len(before) :]


def test_a_model_with_such_a_profile_is_refused_in_a_line(tmp_path):
    folder, context = tmp_path / "model", tmp_path / "context.txt"
    shutil.copytree(embedded_folder(), folder)
    (folder / "kvlink.profile").write_bytes(changed(WRONG["1e400"]))
    context.write_text(CONTEXT)
    done = kvlink("pack", "--model", str(folder), "--context", str(context), "-o", str(tmp_path / "x.kvl"))
    assert done.returncode in (2, 3, 5)
    assert b"Traceback" not in done.stderr
