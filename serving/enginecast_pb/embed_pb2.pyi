from serving.enginecast_pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Match(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MATCH_UNSPECIFIED: _ClassVar[Match]
    MATCH_ITC: _ClassVar[Match]
    MATCH_ITM: _ClassVar[Match]
MATCH_UNSPECIFIED: Match
MATCH_ITC: Match
MATCH_ITM: Match

class EmbedRequest(_message.Message):
    __slots__ = ("model", "texts", "images", "match", "scripts", "terms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    SCRIPTS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    match: Match
    scripts: _containers.RepeatedCompositeFieldContainer[_common_pb2.Script]
    terms: _common_pb2.Terms
    def __init__(self, model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., images: _Optional[_Iterable[bytes]] = ..., match: _Optional[_Union[Match, str]] = ..., scripts: _Optional[_Iterable[_Union[_common_pb2.Script, _Mapping]]] = ..., terms: _Optional[_Union[_common_pb2.Terms, _Mapping]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("queued", "embeddings", "scores", "done")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    queued: _common_pb2.Queued
    embeddings: Embeddings
    scores: Scores
    done: EmbedDone
    def __init__(self, queued: _Optional[_Union[_common_pb2.Queued, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., scores: _Optional[_Union[Scores, _Mapping]] = ..., done: _Optional[_Union[EmbedDone, _Mapping]] = ...) -> None: ...

class FloatArray(_message.Message):
    __slots__ = ("values", "shape")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[float]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Embeddings(_message.Message):
    __slots__ = ("texts", "images", "prompt_tokens")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    texts: FloatArray
    images: FloatArray
    prompt_tokens: int
    def __init__(self, texts: _Optional[_Union[FloatArray, _Mapping]] = ..., images: _Optional[_Union[FloatArray, _Mapping]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: FloatArray
    def __init__(self, scores: _Optional[_Union[FloatArray, _Mapping]] = ...) -> None: ...

class EmbedDone(_message.Message):
    __slots__ = ("timings", "engines", "notes")
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    timings: _common_pb2.Timings
    engines: _containers.RepeatedCompositeFieldContainer[_common_pb2.EngineUse]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, timings: _Optional[_Union[_common_pb2.Timings, _Mapping]] = ..., engines: _Optional[_Iterable[_Union[_common_pb2.EngineUse, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...
