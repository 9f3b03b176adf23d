"""A bundle run in this process, with the same streams of messages as `serving.dialects.grpc.client.Client`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from runtime.bundle.manifest import Bundle
from runtime.engine import Options
from runtime.errors import InvalidInput
from runtime.pipeline import drive
from runtime.placing.loading import load_model
from runtime.placing.placement import Wishes
from runtime.task import task
from serving.dialects.grpc.task import task_of
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
        served = task_of(request)
        _check_task(Bundle(root).manifest.task, served.task)
        return cls(load_model(root, target, options, wishes, request=served.request(request)))

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def generate(self, request: image_pb2.GenerateRequest) -> Iterator[image_pb2.GenerateResponse]:
        """Draw pictures: what ImageService.Generate streams, but for Queued."""
        return self._run(request)

    def chat(self, request: chat_pb2.ChatRequest) -> Iterator[chat_pb2.ChatResponse]:
        """Answer the last message: what ChatService.Chat streams, but for Queued."""
        return self._run(request)

    def _run(self, message: Message) -> Iterator[Any]:
        served = task_of(message)
        _check_task(self._model.task, served.task)
        job = Job(self._model, self._model.pipeline(served.request(message)), drive)
        responses = served.responses()
        return (response for event in job.events() if (response := responses.response(event)) is not None)


def _check_task(found: str, expected: str) -> None:
    if found != expected:
        verb = task(found).verb
        raise InvalidInput("bundle", f"has the task {found}, expected {expected}: use `enginecast {verb}`")
