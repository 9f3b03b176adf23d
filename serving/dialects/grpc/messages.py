"""Messages of enginecast.v1 as the core's requests, and the core's events as messages. Pure functions; pictures become
PNG files here.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message as ProtoMessage

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language import text
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision import images
from serving.enginecast_pb import chat_pb2, common_pb2, image_pb2, model_pb2
from serving.host.job import Done, Queued, Started
from serving.host.models import State, Status

ROLES: Final[dict[int, text.Role]] = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
}
REASONS: Final = {"stop": chat_pb2.FINISH_REASON_STOP, "length": chat_pb2.FINISH_REASON_LENGTH}
STATES: Final = {
    State.UNLOADED: model_pb2.MODEL_STATE_UNLOADED,
    State.LOADING: model_pb2.MODEL_STATE_LOADING,
    State.READY: model_pb2.MODEL_STATE_READY,
    State.UNLOADING: model_pb2.MODEL_STATE_UNLOADING,
    State.FAILED: model_pb2.MODEL_STATE_FAILED,
}
KINDS: Final[dict[str | None, model_pb2.ModelKind]] = {
    None: model_pb2.MODEL_KIND_UNSPECIFIED,
    "image": model_pb2.MODEL_KIND_DIFFUSION,
    "chat": model_pb2.MODEL_KIND_CHAT,
}
IMAGE_OPTIONS: Final = (
    *("negative_prompt", "width", "height", "steps", "guidance_scale"),
    *("sampler", "eta", "seed", "images", "preview_every"),
)
CHAT_OPTIONS: Final = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


def image_request(message: image_pb2.GenerateRequest) -> ImageRequest:
    """The request as the diffusion pipeline takes it; what is unset is left to its defaults. Raises InvalidInput."""
    return ImageRequest(prompt=message.prompt, **_given(message, IMAGE_OPTIONS))


def chat_request(message: chat_pb2.ChatRequest) -> ChatRequest:
    """The request as the chat pipeline takes it, its picture files not yet decoded. Raises InvalidInput naming the
    field.
    """
    limits.MESSAGES.length("messages", message.messages)
    limits.PARTS.count("messages", sum(len(turn.parts) for turn in message.messages))
    limits.PICTURES.count("messages", sum(part.HasField("image") for turn in message.messages for part in turn.parts))
    limits.STOPS.length("stop", message.stop)
    turns = tuple(_turn(turn, f"messages[{i}]") for i, turn in enumerate(message.messages))
    return ChatRequest(messages=turns, stop=tuple(message.stop), **_given(message, CHAT_OPTIONS))


def grace(message: model_pb2.UnloadModelRequest) -> float | None:
    """Seconds that requests get to finish, None when unset. Raises InvalidInput."""
    if not message.HasField("grace_seconds"):
        return None
    limits.GRACE.number("grace_seconds", message.grace_seconds)
    return message.grace_seconds


def _given(message: ProtoMessage, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _turn(turn: chat_pb2.Message, field: str) -> text.Message:
    if turn.role not in ROLES:
        raise InvalidInput(f"{field}.role", "is missing or unknown, expected ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT")
    return text.Message(
        ROLES[turn.role], tuple(_part(part, f"{field}.parts[{i}]") for i, part in enumerate(turn.parts))
    )


def _part(part: chat_pb2.Part, field: str) -> text.Part:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "image":
            return images.PictureFile.open(part.image, f"{field}.image")
        case _:
            raise InvalidInput(field, "is empty, expected text or image")


def png(picture: Any) -> bytes:
    """A PNG file of a uint8 RGB picture [height, width, 3]."""
    return images.encode_image(np.asarray(picture, np.uint8))


class ImageStream:
    """Turns the events of one image request into responses, in order."""

    def __init__(self) -> None:
        self._started = perf_counter()

    def response(self, event: Event) -> image_pb2.GenerateResponse | None:
        """The response that tells of this event; None when nothing does."""
        match event:
            case Queued(position):
                return image_pb2.GenerateResponse(queued=common_pb2.Queued(position=position))
            case Started():
                self._started = perf_counter()
                return None
            case Progress(step, total, preview):
                eta = (perf_counter() - self._started) / max(step, 1) * (total - step)
                shown = None if preview is None else png(preview)
                progress = image_pb2.ImageProgress(step=step, total=total, eta_seconds=eta, preview_png=shown)
                return image_pb2.GenerateResponse(progress=progress)
            case ImageReady(picture, index, seed):
                height, width = picture.shape[:2]
                image = image_pb2.Image(png=png(picture), width=width, height=height, seed=seed, index=index)
                return image_pb2.GenerateResponse(image=image)
            case Done():
                done = image_pb2.ImageDone(timings=_timings(event), engines=_engines(event), notes=event.notes)
                return image_pb2.GenerateResponse(done=done)
        return None


class ChatStream:
    """Turns the events of one chat request into responses, in order."""

    def __init__(self) -> None:
        self._finished = Finished("stop", 0, 0)

    def response(self, event: Event) -> chat_pb2.ChatResponse | None:
        """The response that tells of this event; None when nothing does."""
        match event:
            case Queued(position):
                return chat_pb2.ChatResponse(queued=common_pb2.Queued(position=position))
            case TextDelta(delta):
                return chat_pb2.ChatResponse(delta=chat_pb2.TextDelta(text=delta))
            case Finished():
                self._finished = event
            case Done():
                return chat_pb2.ChatResponse(done=self._done(event))
        return None

    def _done(self, event: Done) -> chat_pb2.ChatDone:
        return chat_pb2.ChatDone(
            reason=REASONS[self._finished.reason],
            prompt_tokens=self._finished.prompt_tokens,
            completion_tokens=self._finished.completion_tokens,
            timings=_timings(event),
            engines=_engines(event),
            notes=event.notes,
        )


def _timings(done: Done) -> common_pb2.Timings:
    return common_pb2.Timings(
        queue_seconds=done.queue_seconds, run_seconds=done.run_seconds, first_output_seconds=done.first_output_seconds
    )


def _engines(done: Done) -> list[common_pb2.EngineUse]:
    return [
        common_pb2.EngineUse(
            submodel=use.submodel,
            target=use.target,
            device=use.device,
            calls=use.calls,
            seconds=use.seconds,
            precision=use.precision,
            fallbacks=use.fallbacks,
            reload_seconds=use.reload_seconds,
            choices=use.choices,
        )
        for use in done.engines
    ]


def model(status: Status) -> model_pb2.Model:
    """A model as the wire shows it."""
    return model_pb2.Model(
        name=status.name,
        state=STATES[status.state],
        kind=KINDS[status.task],
        quant=status.quant,
        target=status.target,
        device=status.device,
        error=status.error,
        running=status.running,
        queued=status.queued,
        placements=[
            model_pb2.Placement(
                submodel=one.submodel,
                target=one.target,
                device=one.device,
                precision=one.precision,
                fallbacks=one.fallbacks,
                choices=one.choices,
            )
            for one in status.placements
        ],
        notes=status.notes,
    )
