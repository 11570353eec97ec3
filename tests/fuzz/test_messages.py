"""Random messages are well formed, reach every field, and come again from the same seed."""

from __future__ import annotations

import random

import pytest

from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.session import ReceiveSession
from tests.fuzz.messages import Maker, Seen
from tests.fuzz.services import SERVICES
from tests.fuzz.transfers import almost_honest, sealed
from tests.wire.vectors import FOLDER, frames_of

INPUTS = {
    f"{service.name}.{method.name}": method.input_type
    for service in SERVICES.values()
    for method in service.methods
}


def set_paths(message, head: str = "") -> set[str]:
    """Names of all fields that are set, at every depth."""
    found = set()
    for field, value in message.ListFields():
        path = f"{head}{field.name}"
        found.add(path)
        if field.message_type:
            for item in value if field.is_repeated else (value,):
                found |= set_paths(item, f"{path}.")
    return found


def all_paths(descriptor, head: str = "") -> set[str]:
    found = set()
    for field in descriptor.fields:
        found.add(f"{head}{field.name}")
        if field.message_type:
            found |= all_paths(field.message_type, f"{head}{field.name}.")
    return found


@pytest.mark.parametrize("name", INPUTS)
def test_every_field_of_every_message_is_filled(name):
    maker, reached, every = Maker(random.Random(0), Seen()), set(), all_paths(INPUTS[name])
    for _ in range(30_000):
        if reached >= every:
            break
        made = maker.message(INPUTS[name])
        assert type(made).FromString(made.SerializeToString()).SerializeToString() == made.SerializeToString()
        reached |= set_paths(made)
    assert every - reached == set()


@pytest.mark.parametrize("name", INPUTS)
def test_the_same_seed_makes_the_same_messages(name):
    one, other = (Maker(random.Random(7), Seen()) for _ in range(2))
    for _ in range(50):
        made = one.message(INPUTS[name]).SerializeToString(deterministic=True)
        assert made == other.message(INPUTS[name]).SerializeToString(deterministic=True)


def test_honest_messages_are_changed_in_places_and_stay_whole_themselves():
    maker = Maker(random.Random(0), Seen())
    honest = pb.Frame.FromString(frames_of("int8")[0])
    before, reached = honest.SerializeToString(), set()
    for _ in range(2000):
        changed = maker.changed(honest, 1)
        reached |= set_paths(changed)
    assert honest.SerializeToString() == before
    assert (
        "manifest.recipe.codec.quantized.overrides.keys.bits" in reached
        and "manifest.shape.whole_layers.layer" in reached
    )


def test_what_was_seen_comes_again():
    seen = Seen()
    seen.note(
        pb.Manifest(
            transfer_id=b"t" * 16, recipe=pb.Recipe(codec=pb.Codec(transform=pb.Transform(basis="own")))
        )
    )
    maker = Maker(random.Random(0), seen)
    made = [maker.message(pb.Manifest.DESCRIPTOR) for _ in range(1000)]
    assert any(one.transfer_id == b"t" * 16 for one in made)
    assert any(one.recipe.codec.transform.basis == "own" for one in made)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.kvl")))
def test_transfers_are_sealed_so_that_no_checksum_refuses_them(name):
    """Until the slip itself is reached: another content under checksums that are right."""
    frames = [pb.Frame.FromString(frame) for frame in frames_of(name)]
    frames[0].manifest.transfer_id = b"another id of 16"
    always = random.Random(0)
    always.random = lambda: 0.0  # type: ignore[method-assign]
    session = ReceiveSession()
    for frame in sealed(frames, always):
        session.receive(frame)
    assert session.state == "done"


def test_some_transfers_stay_honest_and_most_do_not():
    maker = Maker(random.Random(0), Seen())
    transfers = [frames_of(path.stem) for path in sorted(FOLDER.glob("*.kvl"))]
    ends = set()
    for _ in range(300):
        session = ReceiveSession()
        try:
            for frame in almost_honest(transfers, maker):
                session.receive(frame)
            ends.add(session.state)
        except Exception as error:
            ends.add(type(error).__name__)
    assert {"done", "RemoteProtocolError", "IntegrityError"} <= ends
