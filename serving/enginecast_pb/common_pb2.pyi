from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_BACKGROUND: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_URGENT: _ClassVar[Priority]

class OnDisconnect(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_DISCONNECT_UNSPECIFIED: _ClassVar[OnDisconnect]
    ON_DISCONNECT_STOP: _ClassVar[OnDisconnect]
    ON_DISCONNECT_FINISH: _ClassVar[OnDisconnect]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_BACKGROUND: Priority
PRIORITY_NORMAL: Priority
PRIORITY_URGENT: Priority
ON_DISCONNECT_UNSPECIFIED: OnDisconnect
ON_DISCONNECT_STOP: OnDisconnect
ON_DISCONNECT_FINISH: OnDisconnect

class Terms(_message.Message):
    __slots__ = ("keep_alive_seconds", "priority", "on_disconnect", "collect")
    KEEP_ALIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    COLLECT_FIELD_NUMBER: _ClassVar[int]
    keep_alive_seconds: float
    priority: Priority
    on_disconnect: OnDisconnect
    collect: str
    def __init__(self, keep_alive_seconds: _Optional[float] = ..., priority: _Optional[_Union[Priority, str]] = ..., on_disconnect: _Optional[_Union[OnDisconnect, str]] = ..., collect: _Optional[str] = ...) -> None: ...

class Script(_message.Message):
    __slots__ = ("name", "arguments")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: str
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position", "eta_seconds", "id")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    position: int
    eta_seconds: float
    id: str
    def __init__(self, position: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., id: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_seconds", "run_seconds", "first_output_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RUN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_OUTPUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    run_seconds: float
    first_output_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., run_seconds: _Optional[float] = ..., first_output_seconds: _Optional[float] = ...) -> None: ...

class EngineUse(_message.Message):
    __slots__ = ("submodel", "target", "device", "calls", "seconds", "precision", "fallbacks", "reload_seconds", "choices", "reused")
    SUBMODEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    RELOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    submodel: str
    target: str
    device: str
    calls: int
    seconds: float
    precision: str
    fallbacks: _containers.RepeatedScalarFieldContainer[str]
    reload_seconds: float
    choices: _containers.RepeatedScalarFieldContainer[str]
    reused: int
    def __init__(self, submodel: _Optional[str] = ..., target: _Optional[str] = ..., device: _Optional[str] = ..., calls: _Optional[int] = ..., seconds: _Optional[float] = ..., precision: _Optional[str] = ..., fallbacks: _Optional[_Iterable[str]] = ..., reload_seconds: _Optional[float] = ..., choices: _Optional[_Iterable[str]] = ..., reused: _Optional[int] = ...) -> None: ...
