from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_KV: _ClassVar[Mode]
    MODE_TEXT: _ClassVar[Mode]
    MODE_SCOUT: _ClassVar[Mode]
    MODE_HYBRID: _ClassVar[Mode]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_RATIO: _ClassVar[Unit]
    UNIT_COUNT: _ClassVar[Unit]
    UNIT_MASS: _ClassVar[Unit]
    UNIT_BYTES: _ClassVar[Unit]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_SHARED: _ClassVar[Scope]
    SCOPE_HEAD: _ClassVar[Scope]

class When(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHEN_UNSPECIFIED: _ClassVar[When]
    WHEN_AFTER: _ClassVar[When]
    WHEN_DURING: _ClassVar[When]

class Axis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AXIS_UNSPECIFIED: _ClassVar[Axis]
    AXIS_TOKEN: _ClassVar[Axis]
    AXIS_CHANNEL: _ClassVar[Axis]

class Coder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODER_UNSPECIFIED: _ClassVar[Coder]
    CODER_IDENTITY: _ClassVar[Coder]
    CODER_ZSTD: _ClassVar[Coder]
    CODER_RANS: _ClassVar[Coder]
MODE_UNSPECIFIED: Mode
MODE_KV: Mode
MODE_TEXT: Mode
MODE_SCOUT: Mode
MODE_HYBRID: Mode
DTYPE_UNSPECIFIED: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_FLOAT32: Dtype
UNIT_UNSPECIFIED: Unit
UNIT_RATIO: Unit
UNIT_COUNT: Unit
UNIT_MASS: Unit
UNIT_BYTES: Unit
SCOPE_UNSPECIFIED: Scope
SCOPE_SHARED: Scope
SCOPE_HEAD: Scope
WHEN_UNSPECIFIED: When
WHEN_AFTER: When
WHEN_DURING: When
AXIS_UNSPECIFIED: Axis
AXIS_TOKEN: Axis
AXIS_CHANNEL: Axis
CODER_UNSPECIFIED: Coder
CODER_IDENTITY: Coder
CODER_ZSTD: Coder
CODER_RANS: Coder

class Frame(_message.Message):
    __slots__ = ("sequence", "manifest", "segment_header", "segment_end", "end", "group", "chunk")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_END_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    manifest: Manifest
    segment_header: SegmentHeader
    segment_end: SegmentEnd
    end: End
    group: Group
    chunk: Chunk
    def __init__(self, sequence: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., segment_header: _Optional[_Union[SegmentHeader, _Mapping]] = ..., segment_end: _Optional[_Union[SegmentEnd, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., group: _Optional[_Union[Group, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("protocol_version", "transfer_id", "mode", "fingerprint", "shape", "recipe", "prompt", "context_digest", "text_bytes", "sketch", "base", "deadline_ms")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    transfer_id: bytes
    mode: Mode
    fingerprint: Fingerprint
    shape: CacheShape
    recipe: Recipe
    prompt: Prompt
    context_digest: bytes
    text_bytes: int
    sketch: Sketch
    base: Base
    deadline_ms: int
    def __init__(self, protocol_version: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., mode: _Optional[_Union[Mode, str]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., shape: _Optional[_Union[CacheShape, _Mapping]] = ..., recipe: _Optional[_Union[Recipe, _Mapping]] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., context_digest: _Optional[bytes] = ..., text_bytes: _Optional[int] = ..., sketch: _Optional[_Union[Sketch, _Mapping]] = ..., base: _Optional[_Union[Base, _Mapping]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Base(_message.Message):
    __slots__ = ("digest", "tokens", "kept")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    tokens: int
    kept: int
    def __init__(self, digest: _Optional[bytes] = ..., tokens: _Optional[int] = ..., kept: _Optional[int] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("weights", "architecture", "rotary", "tokenizer", "template")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    ROTARY_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    weights: bytes
    architecture: bytes
    rotary: bytes
    tokenizer: bytes
    template: bytes
    def __init__(self, weights: _Optional[bytes] = ..., architecture: _Optional[bytes] = ..., rotary: _Optional[bytes] = ..., tokenizer: _Optional[bytes] = ..., template: _Optional[bytes] = ...) -> None: ...

class Sketch(_message.Message):
    __slots__ = ("layers", "numbers")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layers: _Optional[int] = ..., numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class CacheShape(_message.Message):
    __slots__ = ("layers", "kv_heads", "tokens", "head_size", "dtype", "whole_layers")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    tokens: int
    head_size: int
    dtype: Dtype
    whole_layers: _containers.RepeatedCompositeFieldContainer[WholeLayer]
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., tokens: _Optional[int] = ..., head_size: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., whole_layers: _Optional[_Iterable[_Union[WholeLayer, _Mapping]]] = ...) -> None: ...

class WholeLayer(_message.Message):
    __slots__ = ("layer", "held_tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    held_tokens: int
    def __init__(self, layer: _Optional[int] = ..., held_tokens: _Optional[int] = ...) -> None: ...

class Amount(_message.Message):
    __slots__ = ("value", "unit")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    value: float
    unit: Unit
    def __init__(self, value: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("method", "amount", "scope", "when", "sinks", "recent", "pool", "window", "seed", "press")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    WHEN_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESS_FIELD_NUMBER: _ClassVar[int]
    method: str
    amount: Amount
    scope: Scope
    when: When
    sinks: int
    recent: int
    pool: int
    window: int
    seed: int
    press: str
    def __init__(self, method: _Optional[str] = ..., amount: _Optional[_Union[Amount, _Mapping]] = ..., scope: _Optional[_Union[Scope, str]] = ..., when: _Optional[_Union[When, str]] = ..., sinks: _Optional[int] = ..., recent: _Optional[int] = ..., pool: _Optional[int] = ..., window: _Optional[int] = ..., seed: _Optional[int] = ..., press: _Optional[str] = ...) -> None: ...

class Quantizer(_message.Message):
    __slots__ = ("bits", "axis", "group", "symmetric", "lossless")
    BITS_FIELD_NUMBER: _ClassVar[int]
    AXIS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SYMMETRIC_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    axis: Axis
    group: int
    symmetric: bool
    lossless: bool
    def __init__(self, bits: _Optional[int] = ..., axis: _Optional[_Union[Axis, str]] = ..., group: _Optional[int] = ..., symmetric: bool = ..., lossless: bool = ...) -> None: ...

class LayerOverride(_message.Message):
    __slots__ = ("layer", "keys", "values")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    keys: Quantizer
    values: Quantizer
    def __init__(self, layer: _Optional[int] = ..., keys: _Optional[_Union[Quantizer, _Mapping]] = ..., values: _Optional[_Union[Quantizer, _Mapping]] = ...) -> None: ...

class Codec(_message.Message):
    __slots__ = ("quantized", "low_rank", "transform")
    QUANTIZED_FIELD_NUMBER: _ClassVar[int]
    LOW_RANK_FIELD_NUMBER: _ClassVar[int]
    TRANSFORM_FIELD_NUMBER: _ClassVar[int]
    quantized: Quantized
    low_rank: LowRank
    transform: Transform
    def __init__(self, quantized: _Optional[_Union[Quantized, _Mapping]] = ..., low_rank: _Optional[_Union[LowRank, _Mapping]] = ..., transform: _Optional[_Union[Transform, _Mapping]] = ...) -> None: ...

class Quantized(_message.Message):
    __slots__ = ("keys", "values", "overrides")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    keys: Quantizer
    values: Quantizer
    overrides: _containers.RepeatedCompositeFieldContainer[LayerOverride]
    def __init__(self, keys: _Optional[_Union[Quantizer, _Mapping]] = ..., values: _Optional[_Union[Quantizer, _Mapping]] = ..., overrides: _Optional[_Iterable[_Union[LayerOverride, _Mapping]]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("rank", "factors")
    RANK_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    factors: Quantized
    def __init__(self, rank: _Optional[int] = ..., factors: _Optional[_Union[Quantized, _Mapping]] = ...) -> None: ...

class Transform(_message.Message):
    __slots__ = ("step_code", "basis")
    STEP_CODE_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    step_code: int
    basis: str
    def __init__(self, step_code: _Optional[int] = ..., basis: _Optional[str] = ...) -> None: ...

class Recipe(_message.Message):
    __slots__ = ("mode", "selection", "codec", "coder", "background")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODER_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    selection: Selection
    codec: Codec
    coder: Coder
    background: Codec
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., codec: _Optional[_Union[Codec, _Mapping]] = ..., coder: _Optional[_Union[Coder, str]] = ..., background: _Optional[_Union[Codec, _Mapping]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("template_id", "before", "after", "turns")
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    before: bytes
    after: bytes
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    def __init__(self, template_id: _Optional[str] = ..., before: _Optional[bytes] = ..., after: _Optional[bytes] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("coder", "coded_bytes")
    CODER_FIELD_NUMBER: _ClassVar[int]
    CODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    coder: Coder
    coded_bytes: int
    def __init__(self, coder: _Optional[_Union[Coder, str]] = ..., coded_bytes: _Optional[int] = ...) -> None: ...

class SegmentHeader(_message.Message):
    __slots__ = ("index", "positions", "refinement", "text", "codec")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    REFINEMENT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    index: int
    positions: Positions
    refinement: Refinement
    text: Text
    codec: Codec
    def __init__(self, index: _Optional[int] = ..., positions: _Optional[_Union[Positions, _Mapping]] = ..., refinement: _Optional[_Union[Refinement, _Mapping]] = ..., text: _Optional[_Union[Text, _Mapping]] = ..., codec: _Optional[_Union[Codec, _Mapping]] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("kept", "map_sets", "sliding")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MAP_SETS_FIELD_NUMBER: _ClassVar[int]
    SLIDING_FIELD_NUMBER: _ClassVar[int]
    kept: int
    map_sets: int
    sliding: bool
    def __init__(self, kept: _Optional[int] = ..., map_sets: _Optional[int] = ..., sliding: bool = ...) -> None: ...

class Refinement(_message.Message):
    __slots__ = ("kept", "map_sets")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MAP_SETS_FIELD_NUMBER: _ClassVar[int]
    kept: int
    map_sets: int
    def __init__(self, kept: _Optional[int] = ..., map_sets: _Optional[int] = ...) -> None: ...

class Text(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Group(_message.Message):
    __slots__ = ("parts", "scale_bytes", "crc32c", "data")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SCALE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    scale_bytes: bytes
    crc32c: int
    data: bytes
    def __init__(self, parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., scale_bytes: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "crc32c", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32c: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SegmentEnd(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("digest", "segments")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    segments: int
    def __init__(self, digest: _Optional[bytes] = ..., segments: _Optional[int] = ...) -> None: ...
