"""A bundle run in this process, with the same streams of messages as `serving.dialects.grpc.client.Client`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.bundle.manifest import Bundle
from runtime.engine import Options
from runtime.errors import InvalidInput
from runtime.pipeline import Event, drive
from runtime.placing.loading import load_model
from runtime.placing.placement import Wishes
from runtime.task import Request
from serving.dialects.grpc import messages
from serving.enginecast_pb import chat_pb2, image_pb2
from serving.host.job import Job, Model


class Local:
    """A loaded bundle. Raises what loading raises; every method raises from `runtime.errors`. The model named in a
    request is ignored.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @classmethod
    def open(
        cls,
        root: Path,
        target: str | None = None,
        options: Options | None = None,
        wishes: Wishes | None = None,
        request: image_pb2.GenerateRequest | chat_pb2.ChatRequest | None = None,
    ) -> Local:
        """Load the bundle at `root` for a target, or for the best usable one. A `request` is checked before that, which
        takes long.
        """
        if request is None:
            return cls(load_model(root, target, options, wishes))
        if isinstance(request, image_pb2.GenerateRequest):
            _check_task(Bundle(root).manifest.task, "image")
            return cls(load_model(root, target, options, wishes, request=messages.image_request(request)))
        _check_task(Bundle(root).manifest.task, "chat")
        return cls(load_model(root, target, options, wishes, request=messages.chat_request(request)))

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def generate(self, request: image_pb2.GenerateRequest) -> Iterator[image_pb2.GenerateResponse]:
        """Draw pictures: what ImageService.Generate streams, but for Queued."""
        stream = messages.ImageStream()
        return (
            response for event in self._run(messages.image_request(request)) if (response := stream.response(event))
        )

    def chat(self, request: chat_pb2.ChatRequest) -> Iterator[chat_pb2.ChatResponse]:
        """Answer the last message: what ChatService.Chat streams, but for Queued."""
        stream = messages.ChatStream()
        return (response for event in self._run(messages.chat_request(request)) if (response := stream.response(event)))

    def _run(self, request: Request) -> Iterator[Event]:
        _check_task(self._model.task, request.task)
        return Job(self._model, self._model.pipeline(request), drive).events()


def _check_task(found: str, expected: str) -> None:
    if found != expected:
        does, command = ("draws", "generate") if found == "image" else ("answers", "chat")
        raise InvalidInput(
            "bundle", f"has the task {found}, expected {expected}: it {does}, so use `enginecast {command}`"
        )
