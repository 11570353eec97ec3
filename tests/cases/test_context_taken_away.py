"""A reader deleted what it may only read: a published handle, and a cache that was pushed for two, were gone for all."""

from __future__ import annotations

from kvlink.v1 import receiver_pb2, sender_pb2
from tests.cases.peer import ANSWER, QUESTION, TEXT, Peer, ended
from tests.forging import forged


def fetched(reader: Peer, context_id: str) -> str:
    request = sender_pb2.FetchCacheRequest(context_id=context_id, question=QUESTION, recipe="int8")
    return ended(lambda: reader.call("FetchCache", request))[0]


def test_only_who_published_a_context_unpublishes_it(network):
    anna, mallory = (network.caller(name, network.sender) for name in ("anna", "mallory"))
    (told,) = anna.call("PublishContext", sender_pb2.PublishContextRequest(text=TEXT, readers=["mallory"]))
    assert fetched(mallory, told.context_id) == "OK"
    request = sender_pb2.UnpublishContextRequest(context_id=told.context_id)
    ended(lambda: mallory.call("UnpublishContext", request))
    assert fetched(anna, told.context_id) == "OK"


def test_a_reader_that_deletes_a_cache_ends_its_own_use_of_it(network, source, anna, honest):
    mallory = network.caller("mallory", network.receiver)
    cache_id = source.push(forged(honest()), ["anna", "mallory"]).cache_id
    assert mallory.answer(cache_id) == ANSWER
    ended(lambda: mallory.call("DeleteCache", receiver_pb2.DeleteCacheRequest(cache_id=cache_id)))
    assert ended(lambda: anna.answer(cache_id)) == ("OK", ANSWER)
