"""The story, on one page: read it first.

One agent reads a context. Another has a question. What the first one read travels, cut down to
what the question needs, and the second one answers without having seen the text.
"""

from __future__ import annotations

import io

from kvlink.agent import builder
from kvlink.agent.transfer import count_bytes
from kvlink.cache import KVCache
from kvlink.compress.codec import SegmentPlan, encode
from kvlink.compress.codecs import CodecContext
from kvlink.compress.select import choose_positions
from kvlink.model.generate import answer
from kvlink.model.prefill import prefill, read_question
from kvlink.payload import count_kinds
from kvlink.recipe import Recipe
from kvlink.wire.file import read_frames, write_frames
from kvlink.wire.messages import Manifest
from kvlink.wire.session import SendSession, read_transfer

TEXT = (
    "Mira Dosh was born in Tavik. The weather that week was calm and mild. Ren Holt was born in Lisket. "
    "Mira Dosh plays the cello every evening. Local papers reported on the affair at length. "
    "Ren Holt plays the harp every evening. It rained for three days without a pause."
)
QUESTION = "Which instrument did Mira Dosh learn?"


def test_the_story(tiny):
    # The sender reads the context once. Its cache is what it knows.
    ids = tiny.context_ids(TEXT)
    cache: KVCache = prefill(tiny, ids)
    own = answer(tiny, cache, QUESTION)

    # It drafts an answer, sees what question and draft attend to, and keeps half of the positions.
    recipe = Recipe.parse("q2c+draft@0.5 int8")
    evidence = read_question(tiny, cache, tiny.question_ids(QUESTION, cache.tokens), own.token_ids)
    kept = cache.select(choose_positions(evidence, recipe.selection, cache.shape))

    # It codes them and frames them: a manifest, one segment, an end.
    segment = encode(SegmentPlan.of(kept, recipe.codec), recipe.coder)
    prompt = tiny.template.prompt()
    session = SendSession(Manifest(b"t" * 16, tiny.fingerprint, cache.shape, recipe, prompt, b"c" * 16))
    frames = list(session.transfer([segment]))
    link = io.BytesIO()
    write_frames(frames, link)
    assert TEXT.encode() not in link.getvalue()

    # The receiver checks every byte, decodes, and holds a cache that stands for the whole context.
    link.seek(0)
    manifest, segments = read_transfer(read_frames(link))
    restored = builder.restored(segments, manifest.shape, lambda _: CodecContext())
    assert restored.tokens == len(ids)
    assert restored.layers[0].keys.shape[1] == (len(ids) + 1) // 2

    # It reads the question only, and answers what the sender would have answered.
    assert answer(tiny, restored, QUESTION).text == own.text

    # And everybody knows what it cost.
    bytes_by_kind = count_bytes([len(frame) for frame in frames], count_kinds(segment.groups))
    bits_per_element = 8 * sum(bytes_by_kind.values()) / cache.shape.element_count
    assert bits_per_element < 6
