"""The client's half of the translation: requests as messages of enginecast.v1, and responses as events."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from runtime.language import text
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import PictureFile, decode_image
from serving.dialects.grpc.messages import CHAT_OPTIONS, IMAGE_OPTIONS, REASONS, ROLES, png
from serving.enginecast_pb import chat_pb2, common_pb2, image_pb2
from serving.host.job import Done, EngineUse, Queued

ROLE_NUMBERS: Final = {role: number for number, role in ROLES.items()}
REASON_NAMES: Final = {number: reason for reason, number in REASONS.items()}


def image_message(model: str, request: ImageRequest) -> image_pb2.GenerateRequest:
    """A request for pictures as its message."""
    options = {name: getattr(request, name) for name in IMAGE_OPTIONS}
    return image_pb2.GenerateRequest(model=model, prompt=request.prompt, **options)


def chat_message(model: str, request: ChatRequest) -> chat_pb2.ChatRequest:
    """A request for an answer as its message. Arrays travel as PNG files."""
    options = {name: getattr(request, name) for name in CHAT_OPTIONS}
    turns = [
        chat_pb2.Message(role=ROLE_NUMBERS[turn.role], parts=map(_part, turn.content))  # type: ignore[arg-type]
        for turn in request.messages
    ]
    return chat_pb2.ChatRequest(model=model, messages=turns, stop=request.stop, **options)


def _part(part: text.Part) -> chat_pb2.Part:
    if isinstance(part, str):
        return chat_pb2.Part(text=part)
    return chat_pb2.Part(image=part.data if isinstance(part, PictureFile) else png(part))


def image_events(responses: Iterator[image_pb2.GenerateResponse]) -> Generator[Event, None, None]:
    """The events of a stream of ImageService.Generate."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield Queued(response.queued.position)
            case "progress":
                progress = response.progress
                preview = decode_image(progress.preview_png, "preview") if progress.preview_png else None
                yield Progress(progress.step, progress.total, preview)
            case "image":
                image = response.image
                yield ImageReady(decode_image(image.png), image.index, image.seed)
            case "done":
                yield _done(response.done)


def chat_events(responses: Iterator[chat_pb2.ChatResponse]) -> Generator[Event, None, None]:
    """The events of a stream of ChatService.Chat."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield Queued(response.queued.position)
            case "delta":
                yield TextDelta(response.delta.text)
            case "done":
                done = response.done
                yield Finished(REASON_NAMES[done.reason], done.prompt_tokens, done.completion_tokens)
                yield _done(done)


def _done(message: image_pb2.ImageDone | chat_pb2.ChatDone) -> Done:
    timings = message.timings
    return Done(
        timings.queue_seconds,
        timings.run_seconds,
        timings.first_output_seconds if timings.HasField("first_output_seconds") else None,
        tuple(map(_use, message.engines)),
        tuple(message.notes),
    )


def _use(use: common_pb2.EngineUse) -> EngineUse:
    return EngineUse(
        use.submodel,
        use.target,
        use.device,
        use.calls,
        use.seconds,
        use.precision,
        tuple(use.fallbacks),
        use.reload_seconds,
        tuple(use.choices),
    )
