"""Converts the messages that tasks share and those about models. Pure functions; pictures are encoded as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Final

import numpy as np
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message as ProtoMessage

from runtime import limits
from runtime.errors import InvalidInput, quoted
from runtime.files import strict_json
from runtime.scripting import Listed
from runtime.vision import images
from serving.dialects.grpc.task import grpc_tasks
from serving.enginecast_pb import common_pb2, model_pb2
from serving.host.job import Done, EngineUse, Queued
from serving.host.offers import ENDLESS
from serving.host.shown import shortened
from serving.host.states import ModelState, Status
from serving.host.terms import Priority, Terms

SCRIPTS: Final = "scripts"
"""The field of a task's message that names scripts."""
STATES: Final = {
    ModelState.UNLOADED: model_pb2.MODEL_STATE_UNLOADED,
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.UNLOADING: model_pb2.MODEL_STATE_UNLOADING,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}

PRIORITIES: Final[Mapping[int, Priority]] = {
    common_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    common_pb2.PRIORITY_BACKGROUND: Priority.BACKGROUND,
    common_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    common_pb2.PRIORITY_URGENT: Priority.URGENT,
}
FINISHES: Final[Mapping[int, bool]] = {
    common_pb2.ON_DISCONNECT_UNSPECIFIED: False,
    common_pb2.ON_DISCONNECT_STOP: False,
    common_pb2.ON_DISCONNECT_FINISH: True,
}


def grace(message: model_pb2.UnloadModelRequest) -> float | None:
    """Seconds that requests get to finish, None when unset. Raises InvalidInput."""
    if not message.HasField("grace_seconds"):
        return None
    limits.GRACE.number("grace_seconds", message.grace_seconds)
    return message.grace_seconds


def keep_alive(message: ProtoMessage) -> float | None:
    """Seconds that a model stays loaded, None when unset or if the message has no such field. Raises InvalidInput."""
    field = "keep_alive_seconds"
    if field not in message.DESCRIPTOR.fields_by_name or not message.HasField(field):
        return None
    seconds: float = getattr(message, field)
    limits.KEEP_ALIVE.number(field, seconds)
    return ENDLESS if seconds < 0 else seconds


def terms_of(message: Any) -> common_pb2.Terms:
    """The terms in a task's message, empty where it has no such field."""
    found: common_pb2.Terms = message.terms if "terms" in message.DESCRIPTOR.fields_by_name else common_pb2.Terms()
    return found


def terms(message: common_pb2.Terms) -> Terms:
    """How a request is run. Raises InvalidInput."""
    if message.priority not in PRIORITIES:
        raise InvalidInput("terms.priority", f"is {message.priority}, expected a value of Priority")
    if message.on_disconnect not in FINISHES:
        raise InvalidInput("terms.on_disconnect", f"is {message.on_disconnect}, expected a value of OnDisconnect")
    return Terms(keep_alive(message), PRIORITIES[message.priority], FINISHES[message.on_disconnect])


def terms_message(terms: Terms) -> common_pb2.Terms:
    """The reverse of `terms`."""
    priorities = {name: number for number, name in PRIORITIES.items()}
    return common_pb2.Terms(
        keep_alive_seconds=terms.keep_alive,
        priority=priorities[terms.priority],  # type: ignore[arg-type]  # the stubs lack the numbers
        on_disconnect=common_pb2.ON_DISCONNECT_FINISH if terms.finish else common_pb2.ON_DISCONNECT_STOP,
    )


def scripts(message: Any) -> dict[str, dict[str, Any]]:
    """The scripts in a task's message, none where it has no such field. Raises InvalidInput."""
    found: dict[str, dict[str, Any]] = {}
    for one in message.scripts if SCRIPTS in message.DESCRIPTOR.fields_by_name else ():
        limits.NAME.length(SCRIPTS, one.name)
        limits.SCRIPT_ARGUMENTS.length(f"{SCRIPTS}.{one.name}", one.arguments)
        if one.name in found:
            raise InvalidInput(SCRIPTS, f"names {quoted(one.name)} twice: give it all arguments at once")
        try:
            arguments = strict_json(one.arguments.encode()) if one.arguments else {}
        except ValueError as error:
            raise InvalidInput(f"{SCRIPTS}.{one.name}", f"has arguments that are no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise InvalidInput(f"{SCRIPTS}.{one.name}", "has arguments that are no JSON object")
        found[one.name] = arguments
    return found


def scripts_message(scripts: Mapping[str, Mapping[str, Any]]) -> list[common_pb2.Script]:
    """The reverse of `scripts`. Raises InvalidInput for arguments that are no JSON."""
    try:
        return [common_pb2.Script(name=name, arguments=json.dumps(dict(one))) for name, one in scripts.items()]
    except (TypeError, ValueError) as error:
        raise InvalidInput(SCRIPTS, f"have arguments that are no JSON: {error}") from None


def script_info(found: Listed) -> model_pb2.ScriptInfo:
    """The message of an installed script."""
    return model_pb2.ScriptInfo(
        name=found.name,
        summary=found.summary,
        tasks=found.tasks,
        arguments_schema=json.dumps(found.arguments) if found.arguments is not None else "",
        error=shortened(found.error),
    )


def given(message: ProtoMessage, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named fields that are set, with their values."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def png(picture: Any) -> bytes:
    """Encode a uint8 RGB picture [height, width, 3] as PNG."""
    return images.encode_image(np.asarray(picture, np.uint8))


def file_of(picture: images.Picture | images.PictureFile) -> bytes:
    """The bytes of a picture file; of pixels, a PNG file."""
    return picture.data if isinstance(picture, images.PictureFile) else png(picture)


def queued(event: Queued) -> common_pb2.Queued:
    """A request's place in the queue."""
    return common_pb2.Queued(position=event.position, eta_seconds=event.eta_seconds, id=event.id)


def queued_event(message: common_pb2.Queued) -> Queued:
    """The reverse of `queued`."""
    return Queued(message.position, message.eta_seconds if message.HasField("eta_seconds") else None, message.id)


def timings(done: Done) -> common_pb2.Timings:
    """The times of a request."""
    return common_pb2.Timings(
        queue_seconds=done.queue_seconds, run_seconds=done.run_seconds, first_output_seconds=done.first_output_seconds
    )


def engines(done: Done) -> list[common_pb2.EngineUse]:
    """The engines that ran the submodels."""
    return [common_pb2.EngineUse(**asdict(use)) for use in done.engines]


def done_event(message: Any) -> Done:
    """The `Done` event of the last message of a stream: the reverse of `timings` and `engines`."""
    timings = message.timings
    return Done(
        timings.queue_seconds,
        timings.run_seconds,
        timings.first_output_seconds if timings.HasField("first_output_seconds") else None,
        tuple(map(_use, message.engines)),
        tuple(message.notes),
    )


def _use(message: common_pb2.EngineUse) -> EngineUse:
    """The message has every field of the class, under its name."""
    given: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(EngineUse)}
    lists = {name: tuple(value) for name, value in given.items() if not isinstance(value, str | int | float)}
    return EngineUse(**given | lists)


def model(status: Status) -> model_pb2.Model:
    """The message of a model's status."""
    return model_pb2.Model(
        name=status.name,
        state=STATES[status.state],
        kind=grpc_tasks()[status.task].kind if status.task in grpc_tasks() else model_pb2.MODEL_KIND_UNSPECIFIED,
        quant=status.quant,
        target=status.target,
        device=status.device,
        error=status.error,
        running=status.running,
        queued=status.queued,
        placements=[model_pb2.Placement(**asdict(one)) for one in status.placements],
        notes=status.notes,
        version=status.version,
        is_default=status.is_default,
        loads_on_demand=status.on_demand,
        reloading=status.reloading,
        memory_bytes=status.memory,
        idle_seconds=status.idle_seconds,
        unload_seconds=status.unload_seconds,
        counts=status.counts,
        abilities=json_format.ParseDict(dict(status.abilities), struct_pb2.Struct()),
        loading_submodels=status.coming,
    )
