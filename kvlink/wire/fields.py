"""The rule of every field of every message, in both directions: the one table of bounds.

A field that is not here is not taken: a test walks the protocol's messages. What only a session can
know (the order of frames, sizes that follow from manifest and header) it checks itself.

Does not know: who sends a message. Place on the path: at the border, right behind the parser.
"""

from __future__ import annotations

from kvlink.bounds import (
    ANSWER,
    FRAME,
    LAYERS,
    MESSAGE,
    PIECE,
    RECIPE,
    SHOWN,
    TEXT,
    TOKENS,
    TURNS,
    ByName,
    Bytes,
    Inner,
    Known,
    Many,
    Number,
    OneOf,
    Rule,
    Whole,
    Words,
)
from kvlink.codecs import CODECS
from kvlink.payload import DEADLINE_MS
from kvlink.receipt import BYTE_KINDS, STAGES

_ID = Words(64, r"[A-Za-z0-9_-]*", "letters, digits, _ and -")
_NAME = Words(64, r"[\x21-\x7e]*", "printable ASCII without blanks")
_PEER = Words(64)
_DIGEST = Bytes((16,))
_TRANSFER = Bytes((16,))
_TRANSFER_OR_NONE = Bytes((0, 16))
_FRAME = Bytes(most=MESSAGE.most)
"""A session's own limit is narrower, and it names the frame."""
_SECONDS = Number(0, 1e6)
_SIZE = Whole(0, 2**63 - 1)
_COUNT = Whole(0, 2**32 - 1)
_SHARE = Number(0, 1.001)
"""1 and what float32 adds to it."""

Rules = dict[str, Rule]

CAPABILITIES: Rules = {
    "protocol_min": Whole(0, 1000),
    "protocol_max": Whole(0, 1000),
    "model_name": Words(4096),
    "fingerprint": Inner(),
    "modes": Many(64),
    "codecs": Many(64, _NAME),
    "coders": Many(64),
    "limits": Inner(),
    "prefill_tokens_per_s": Number(0, 1e12),
    "release": _NAME,
    "dtype": Known(),
    "profiles": Many(64, _DIGEST),
    "sketch": Inner(),
    "address": Words(320, r"[\x21-\x7e]*", "printable ASCII without blanks"),
}

FIELDS: dict[str, Rules] = {
    # common.proto
    "Capabilities": CAPABILITIES,
    "Limits": dict.fromkeys(
        (
            "max_cache_bytes", "max_context_tokens", "max_frame_bytes", "max_segments", "max_text_bytes",
            "max_new_tokens", "max_profile_bytes",
        ), _SIZE),
    "Receipt": {
        "stage_s": ByName(STAGES, _SECONDS),
        "bytes": ByName(BYTE_KINDS, _SIZE),
        "wire_bytes": _SIZE,
        "socket_bytes": _SIZE,
        "bits_per_element": Number(0, 1e9),
        "context_tokens": Whole(0, TOKENS.most),
        "kept_tokens": Whole(0, TOKENS.most),
        "recipe": Words(RECIPE.most),
        "transfer_id": Words(32, r"([0-9a-f]{32})?", "32 hex digits or none"),
        "element_count": _SIZE,
        "segments": _COUNT,
        "kept_share": Number(0, 1),
        "cache_digest": Words(32, r"([0-9a-f]{32})?", "32 hex digits or none"),
        "certificate": Inner(),
    },
    "Certificate": {
        "agreeing_tokens": _COUNT,
        "tokens": _COUNT,
        "kl_mean": Number(0, 1e9),
        "logit_error": Number(0, 1e9),
        "escalations": Whole(0, 1000),
        "seconds": _SECONDS,
    },
    "Target": {
        "budget_bytes": _SIZE, "max_bits": Number(0, 1e6), "quality": Number(0, 1), "verify": Known(),
        "deadline_s": Number(0, DEADLINE_MS / 1e3), "allow_text": Known(),
    },
    "Heartbeat": {},
    "GetCapabilitiesRequest": {},
    "GetCapabilitiesResponse": {"capabilities": Inner()},
    # receiver.proto
    "PutProfileRequest": {"start": Inner(), "data": Bytes(most=PIECE.most)},
    "PutProfileStart": {"digest": _DIGEST, "total_bytes": _SIZE},
    "PutProfileResponse": {"digest": _DIGEST},
    "PushCacheRequest": {"frame": _FRAME},
    "PushCacheResponse": {"state": Known(), "next_sequence": _COUNT, "cache_id": _ID, "receipt": Inner()},
    "GetTransferStatusRequest": {"transfer_id": _TRANSFER},
    "GetTransferStatusResponse": {
        "state": Known(), "next_sequence": _COUNT, "cache_id": _ID, "why": Words(8192),
    },
    "CancelTransferRequest": {"transfer_id": _TRANSFER},
    "CancelTransferResponse": {},
    "GenerateRequest": {
        "cache_id": _ID,
        "question": Words(TEXT.most),
        "max_new_tokens": _COUNT,
        "temperature": Number(0, 10),
        "seed": Whole(0, 2**64 - 1),
        "handle": Words(400, r"[\x21-\x7e]*", "printable ASCII without blanks"),
        "recipe": Words(RECIPE.most),
        "target": Inner(),
    },
    "GenerateResponse": {
        "cache_id": _ID,
        "text": Words(1_000_000), "token_ids": Many(4096, _COUNT), "done": Known(), "receipt": Inner(),
    },
    "DeleteCacheRequest": {"cache_id": _ID},
    "DeleteCacheResponse": {},
    # sender.proto
    "Turn": {"role": OneOf(("system", "user", "assistant")), "content": Words(TEXT.most)},
    "PublishContextRequest": {
        "text": Words(TEXT.most), "lifetime_s": _COUNT, "earlier_turns": Many(TURNS.most), "readers": Many(16, _PEER),
        "extends": _ID,
    },
    "PublishContextResponse": {
        "context_id": Words(64, r"[A-Za-z0-9_-]+", "letters, digits, _ and -"),
        "context_tokens": Whole(1, TOKENS.most),
        "cache_bytes": _SIZE,
        "prefill_s": _SECONDS,
        "lifetime_s": _COUNT,
    },
    "UnpublishContextRequest": {"context_id": _ID},
    "UnpublishContextResponse": {},
    "FetchCacheRequest": {
        "context_id": _ID,
        "question": Words(TEXT.most),
        "recipe": Words(RECIPE.most),
        "transfer_id": _TRANSFER_OR_NONE,
        "base_digest": _TRANSFER_OR_NONE,
        "next_sequence": _COUNT,
        "target": Inner(),
    },
    "FetchCacheResponse": {"frame": _FRAME, "heartbeat": Inner()},
    "DeliverCacheRequest": {
        "context_id": _ID,
        "text": Words(TEXT.most),
        "question": Words(TEXT.most),
        "recipe": Words(RECIPE.most),
        "receiver": Words(320),
        "answer_here": Known(),
        "explain": Known(),
        "base_digest": _TRANSFER_OR_NONE,
        "delivery_id": _TRANSFER_OR_NONE,
        "target": Inner(),
    },
    "CancelDeliveryRequest": {"delivery_id": _TRANSFER},
    "CancelDeliveryResponse": {},
    "Explanation": {
        "tokens": Many(SHOWN.most, Words(65_536)),
        "need": Many(SHOWN.most, _SHARE),
        "kept": Many(SHOWN.most, _SHARE),
    },
    "DeliverCacheResponse": {
        "sent_bytes": _SIZE,
        "total_bytes": _SIZE,
        "done": Known(),
        "cache_id": _ID,
        "receipt": Inner(),
        "sender_answer": Words(ANSWER.most),
        "explanation": Inner(),
    },
    # wire.proto
    "Manifest": {
        "protocol_version": _COUNT,
        "transfer_id": _TRANSFER,
        "mode": Known(),
        "fingerprint": Inner(),
        "shape": Inner(),
        "recipe": Inner(),
        "prompt": Inner(),
        "context_digest": _DIGEST,
        "text_bytes": _SIZE,
        "sketch": Inner(),
        "base": Inner(),
        "deadline_ms": Whole(0, DEADLINE_MS),
    },
    "Base": {"digest": _DIGEST, "tokens": Whole(1, TOKENS.most), "kept": Whole(1, TOKENS.most)},
    "Sketch": {"layers": Whole(1, LAYERS.most), "numbers": Many(80, Whole(-(2**20), 2**20))},
    "Fingerprint": dict.fromkeys(("weights", "architecture", "rotary", "tokenizer", "template"), _DIGEST),
    "CacheShape": {
        "layers": Whole(1, LAYERS.most),
        "kv_heads": Whole(1, 4096),
        "tokens": Whole(1, TOKENS.most),
        "head_size": Whole(1, 65_536),
        "dtype": Known(),
        "whole_layers": Many(LAYERS.most),
    },
    "WholeLayer": {"layer": Whole(0, LAYERS.most - 1), "held_tokens": Whole(1, TOKENS.most)},
    "Amount": {"value": Number(0, 1e18), "unit": Known()},
    "Selection": {
        "method": Words(64, r"[a-z0-9+_-]*", "small letters, digits, +, - and _"),
        "amount": Inner(),
        "scope": Known(),
        "when": Known(),
        **dict.fromkeys(("sinks", "recent", "pool", "window", "seed"), _COUNT),
        "press": Words(64, r"[A-Za-z0-9]*", "letters and digits"),
    },
    "Quantizer": {
        "bits": Whole(1, 16), "axis": Known(), "group": Whole(2, 65_536), "symmetric": Known(), "lossless": Known(),
    },
    "LayerOverride": {"layer": Whole(0, 65_535), "keys": Inner(), "values": Inner()},
    "Codec": dict.fromkeys(CODECS, Inner()),
    **{codec.__name__: dict(codec.FIELDS) for codec in CODECS.values()},
    "Recipe": {"mode": Known(), "selection": Inner(), "codec": Inner(), "coder": Known(), "background": Inner()},
    "SegmentHeader": {
        "index": _COUNT, "positions": Inner(), "refinement": Inner(), "text": Inner(), "codec": Inner(),
    },
    "Positions": {"kept": _COUNT, "map_sets": _COUNT, "sliding": Known()},
    "Refinement": {"kept": _COUNT, "map_sets": _COUNT},
    "Text": {},
    "Prompt": {
        "template_id": _NAME, "before": Bytes(most=FRAME.most), "after": Bytes(most=65_536), "turns": Many(TURNS.most),
    },
}  # fmt: skip

BY_THE_SESSION = ("Frame", "Group", "Part", "Chunk", "SegmentEnd", "End")
"""Messages whose every field `ReceiveSession` compares with what it must be."""
