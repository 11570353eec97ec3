from kvlink.v1 import common_pb2 as _common_pb2
from kvlink.v1 import wire_pb2 as _wire_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from kvlink.v1.wire_pb2 import Frame as Frame
from kvlink.v1.wire_pb2 import Manifest as Manifest
from kvlink.v1.wire_pb2 import Base as Base
from kvlink.v1.wire_pb2 import Fingerprint as Fingerprint
from kvlink.v1.wire_pb2 import Sketch as Sketch
from kvlink.v1.wire_pb2 import CacheShape as CacheShape
from kvlink.v1.wire_pb2 import WholeLayer as WholeLayer
from kvlink.v1.wire_pb2 import Amount as Amount
from kvlink.v1.wire_pb2 import Selection as Selection
from kvlink.v1.wire_pb2 import Quantizer as Quantizer
from kvlink.v1.wire_pb2 import LayerOverride as LayerOverride
from kvlink.v1.wire_pb2 import Codec as Codec
from kvlink.v1.wire_pb2 import Quantized as Quantized
from kvlink.v1.wire_pb2 import LowRank as LowRank
from kvlink.v1.wire_pb2 import Transform as Transform
from kvlink.v1.wire_pb2 import Recipe as Recipe
from kvlink.v1.wire_pb2 import Turn as Turn
from kvlink.v1.wire_pb2 import Prompt as Prompt
from kvlink.v1.wire_pb2 import Part as Part
from kvlink.v1.wire_pb2 import SegmentHeader as SegmentHeader
from kvlink.v1.wire_pb2 import Positions as Positions
from kvlink.v1.wire_pb2 import Refinement as Refinement
from kvlink.v1.wire_pb2 import Text as Text
from kvlink.v1.wire_pb2 import Group as Group
from kvlink.v1.wire_pb2 import Chunk as Chunk
from kvlink.v1.wire_pb2 import SegmentEnd as SegmentEnd
from kvlink.v1.wire_pb2 import End as End
from kvlink.v1.wire_pb2 import Mode as Mode
from kvlink.v1.wire_pb2 import Dtype as Dtype
from kvlink.v1.wire_pb2 import Unit as Unit
from kvlink.v1.wire_pb2 import Scope as Scope
from kvlink.v1.wire_pb2 import When as When
from kvlink.v1.wire_pb2 import Axis as Axis
from kvlink.v1.wire_pb2 import Coder as Coder

DESCRIPTOR: _descriptor.FileDescriptor
MODE_UNSPECIFIED: _wire_pb2.Mode
MODE_KV: _wire_pb2.Mode
MODE_TEXT: _wire_pb2.Mode
MODE_SCOUT: _wire_pb2.Mode
MODE_HYBRID: _wire_pb2.Mode
DTYPE_UNSPECIFIED: _wire_pb2.Dtype
DTYPE_BFLOAT16: _wire_pb2.Dtype
DTYPE_FLOAT16: _wire_pb2.Dtype
DTYPE_FLOAT32: _wire_pb2.Dtype
UNIT_UNSPECIFIED: _wire_pb2.Unit
UNIT_RATIO: _wire_pb2.Unit
UNIT_COUNT: _wire_pb2.Unit
UNIT_MASS: _wire_pb2.Unit
UNIT_BYTES: _wire_pb2.Unit
SCOPE_UNSPECIFIED: _wire_pb2.Scope
SCOPE_SHARED: _wire_pb2.Scope
SCOPE_HEAD: _wire_pb2.Scope
WHEN_UNSPECIFIED: _wire_pb2.When
WHEN_AFTER: _wire_pb2.When
WHEN_DURING: _wire_pb2.When
AXIS_UNSPECIFIED: _wire_pb2.Axis
AXIS_TOKEN: _wire_pb2.Axis
AXIS_CHANNEL: _wire_pb2.Axis
CODER_UNSPECIFIED: _wire_pb2.Coder
CODER_IDENTITY: _wire_pb2.Coder
CODER_ZSTD: _wire_pb2.Coder
CODER_RANS: _wire_pb2.Coder

class PublishContextRequest(_message.Message):
    __slots__ = ("text", "lifetime_s", "earlier_turns", "readers", "extends")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    EARLIER_TURNS_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    EXTENDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    lifetime_s: int
    earlier_turns: _containers.RepeatedCompositeFieldContainer[_wire_pb2.Turn]
    readers: _containers.RepeatedScalarFieldContainer[str]
    extends: str
    def __init__(self, text: _Optional[str] = ..., lifetime_s: _Optional[int] = ..., earlier_turns: _Optional[_Iterable[_Union[_wire_pb2.Turn, _Mapping]]] = ..., readers: _Optional[_Iterable[str]] = ..., extends: _Optional[str] = ...) -> None: ...

class PublishContextResponse(_message.Message):
    __slots__ = ("context_id", "context_tokens", "cache_bytes", "prefill_s", "lifetime_s")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    context_tokens: int
    cache_bytes: int
    prefill_s: float
    lifetime_s: int
    def __init__(self, context_id: _Optional[str] = ..., context_tokens: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., prefill_s: _Optional[float] = ..., lifetime_s: _Optional[int] = ...) -> None: ...

class UnpublishContextRequest(_message.Message):
    __slots__ = ("context_id",)
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    def __init__(self, context_id: _Optional[str] = ...) -> None: ...

class UnpublishContextResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchCacheRequest(_message.Message):
    __slots__ = ("context_id", "question", "recipe", "target", "transfer_id", "next_sequence", "base_digest")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    question: str
    recipe: str
    target: _common_pb2.Target
    transfer_id: bytes
    next_sequence: int
    base_digest: bytes
    def __init__(self, context_id: _Optional[str] = ..., question: _Optional[str] = ..., recipe: _Optional[str] = ..., target: _Optional[_Union[_common_pb2.Target, _Mapping]] = ..., transfer_id: _Optional[bytes] = ..., next_sequence: _Optional[int] = ..., base_digest: _Optional[bytes] = ...) -> None: ...

class FetchCacheResponse(_message.Message):
    __slots__ = ("frame", "heartbeat")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    heartbeat: _common_pb2.Heartbeat
    def __init__(self, frame: _Optional[bytes] = ..., heartbeat: _Optional[_Union[_common_pb2.Heartbeat, _Mapping]] = ...) -> None: ...

class DeliverCacheRequest(_message.Message):
    __slots__ = ("context_id", "text", "question", "recipe", "target", "receiver", "answer_here", "explain", "delivery_id", "base_digest")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    ANSWER_HERE_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    text: str
    question: str
    recipe: str
    target: _common_pb2.Target
    receiver: str
    answer_here: bool
    explain: bool
    delivery_id: bytes
    base_digest: bytes
    def __init__(self, context_id: _Optional[str] = ..., text: _Optional[str] = ..., question: _Optional[str] = ..., recipe: _Optional[str] = ..., target: _Optional[_Union[_common_pb2.Target, _Mapping]] = ..., receiver: _Optional[str] = ..., answer_here: bool = ..., explain: bool = ..., delivery_id: _Optional[bytes] = ..., base_digest: _Optional[bytes] = ...) -> None: ...

class CancelDeliveryRequest(_message.Message):
    __slots__ = ("delivery_id",)
    DELIVERY_ID_FIELD_NUMBER: _ClassVar[int]
    delivery_id: bytes
    def __init__(self, delivery_id: _Optional[bytes] = ...) -> None: ...

class CancelDeliveryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("tokens", "need", "kept")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    need: _containers.RepeatedScalarFieldContainer[float]
    kept: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., need: _Optional[_Iterable[float]] = ..., kept: _Optional[_Iterable[float]] = ...) -> None: ...

class DeliverCacheResponse(_message.Message):
    __slots__ = ("sent_bytes", "total_bytes", "done", "cache_id", "receipt", "sender_answer", "explanation")
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SENDER_ANSWER_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    sent_bytes: int
    total_bytes: int
    done: bool
    cache_id: str
    receipt: _common_pb2.Receipt
    sender_answer: str
    explanation: Explanation
    def __init__(self, sent_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., done: bool = ..., cache_id: _Optional[str] = ..., receipt: _Optional[_Union[_common_pb2.Receipt, _Mapping]] = ..., sender_answer: _Optional[str] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...
