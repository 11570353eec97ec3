from kvlink.v1 import wire_pb2 as _wire_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Capabilities(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "model_name", "fingerprint", "modes", "codecs", "coders", "limits", "prefill_tokens_per_s", "release", "dtype", "profiles", "sketch", "address")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    CODERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    model_name: str
    fingerprint: _wire_pb2.Fingerprint
    modes: _containers.RepeatedScalarFieldContainer[_wire_pb2.Mode]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    coders: _containers.RepeatedScalarFieldContainer[_wire_pb2.Coder]
    limits: Limits
    prefill_tokens_per_s: float
    release: str
    dtype: _wire_pb2.Dtype
    profiles: _containers.RepeatedScalarFieldContainer[bytes]
    sketch: _wire_pb2.Sketch
    address: str
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., model_name: _Optional[str] = ..., fingerprint: _Optional[_Union[_wire_pb2.Fingerprint, _Mapping]] = ..., modes: _Optional[_Iterable[_Union[_wire_pb2.Mode, str]]] = ..., codecs: _Optional[_Iterable[str]] = ..., coders: _Optional[_Iterable[_Union[_wire_pb2.Coder, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ..., release: _Optional[str] = ..., dtype: _Optional[_Union[_wire_pb2.Dtype, str]] = ..., profiles: _Optional[_Iterable[bytes]] = ..., sketch: _Optional[_Union[_wire_pb2.Sketch, _Mapping]] = ..., address: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_cache_bytes", "max_context_tokens", "max_frame_bytes", "max_segments", "max_text_bytes", "max_new_tokens", "max_profile_bytes")
    MAX_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROFILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_cache_bytes: int
    max_context_tokens: int
    max_frame_bytes: int
    max_segments: int
    max_text_bytes: int
    max_new_tokens: int
    max_profile_bytes: int
    def __init__(self, max_cache_bytes: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., max_frame_bytes: _Optional[int] = ..., max_segments: _Optional[int] = ..., max_text_bytes: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_profile_bytes: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("stage_s", "bytes", "wire_bytes", "socket_bytes", "bits_per_element", "context_tokens", "kept_tokens", "recipe", "transfer_id", "element_count", "certificate", "segments", "kept_share", "cache_digest")
    class StageSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class BytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STAGE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_ELEMENT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_SHARE_FIELD_NUMBER: _ClassVar[int]
    CACHE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    stage_s: _containers.ScalarMap[str, float]
    bytes: _containers.ScalarMap[str, int]
    wire_bytes: int
    socket_bytes: int
    bits_per_element: float
    context_tokens: int
    kept_tokens: int
    recipe: str
    transfer_id: str
    element_count: int
    certificate: Certificate
    segments: int
    kept_share: float
    cache_digest: str
    def __init__(self, stage_s: _Optional[_Mapping[str, float]] = ..., bytes: _Optional[_Mapping[str, int]] = ..., wire_bytes: _Optional[int] = ..., socket_bytes: _Optional[int] = ..., bits_per_element: _Optional[float] = ..., context_tokens: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., recipe: _Optional[str] = ..., transfer_id: _Optional[str] = ..., element_count: _Optional[int] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., segments: _Optional[int] = ..., kept_share: _Optional[float] = ..., cache_digest: _Optional[str] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("agreeing_tokens", "tokens", "kl_mean", "logit_error", "escalations", "seconds")
    AGREEING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KL_MEAN_FIELD_NUMBER: _ClassVar[int]
    LOGIT_ERROR_FIELD_NUMBER: _ClassVar[int]
    ESCALATIONS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    agreeing_tokens: int
    tokens: int
    kl_mean: float
    logit_error: float
    escalations: int
    seconds: float
    def __init__(self, agreeing_tokens: _Optional[int] = ..., tokens: _Optional[int] = ..., kl_mean: _Optional[float] = ..., logit_error: _Optional[float] = ..., escalations: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("budget_bytes", "max_bits", "quality", "verify", "deadline_s", "allow_text")
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BITS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    ALLOW_TEXT_FIELD_NUMBER: _ClassVar[int]
    budget_bytes: int
    max_bits: float
    quality: float
    verify: bool
    deadline_s: float
    allow_text: bool
    def __init__(self, budget_bytes: _Optional[int] = ..., max_bits: _Optional[float] = ..., quality: _Optional[float] = ..., verify: bool = ..., deadline_s: _Optional[float] = ..., allow_text: bool = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("capabilities",)
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    capabilities: Capabilities
    def __init__(self, capabilities: _Optional[_Union[Capabilities, _Mapping]] = ...) -> None: ...
