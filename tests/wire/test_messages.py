"""Values and protobuf messages are the same thing in two forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from kvlink.errors import IdentityError, RemoteProtocolError
from kvlink.payload import CacheShape, Fingerprint
from kvlink.sketch import Sketch
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.messages import (
    manifest_from_proto,
    manifest_to_proto,
    recipe_from_proto,
    recipe_to_proto,
    shape_from_proto,
    shape_to_proto,
)
from tests.test_recipe import recipes
from tests.wire.samples import FINGERPRINT, make_transfer


@given(recipes())
def test_recipes_round_trip_through_protobuf(recipe):
    wire = recipe_to_proto(recipe).SerializeToString()
    assert recipe_from_proto(pb.Recipe.FromString(wire)) == recipe


def test_manifests_round_trip():
    for recipe in ("q2c@0.5 int4", "text", "raw"):
        manifest, _, _ = make_transfer(recipe)
        assert manifest_from_proto(manifest_to_proto(manifest)) == manifest
        sketched = replace(manifest, sketch=Sketch(3, tuple(range(-30, 30, 2))))
        assert manifest_from_proto(manifest_to_proto(sketched)) == sketched


def test_shapes_with_whole_layers_round_trip():
    shape = CacheShape(4, 2, 100, 16, "float16", ((0, 31), (2, 31)))
    assert shape_from_proto(shape_to_proto(shape)) == shape
    assert shape.element_count == 2 * 2 * 16 * (100 + 100 + 31 + 31)


@pytest.mark.parametrize("name", ["weights", "architecture", "rotary", "tokenizer", "template"])
def test_a_different_component_is_refused_by_its_name(name):
    other: Fingerprint = replace(FINGERPRINT, **{name: b"x" * 16})
    with pytest.raises(IdentityError, match=f"{name} differ"):
        FINGERPRINT.require_match(other, "kv")
    if name in ("tokenizer", "template"):
        with pytest.raises(IdentityError, match=f"{name} differ"):
            FINGERPRINT.require_match(other, "text")
    else:
        FINGERPRINT.require_match(other, "text")


def crowded(**lists: int) -> pb.Manifest:
    message = manifest_to_proto(make_transfer("int4")[0])
    for _ in range(lists.get("overrides", 0)):
        message.recipe.codec.quantized.overrides.add(layer=1)
    for _ in range(lists.get("whole_layers", 0)):
        message.shape.whole_layers.add(layer=1, held_tokens=1)
    return message


@pytest.mark.parametrize("name", ["overrides", "whole_layers"])
def test_lists_without_end_are_refused_by_their_length(name):
    with pytest.raises(RemoteProtocolError, match="at most"):
        manifest_from_proto(crowded(**{name: 200_000}))
