"""A bundle run in this process, with the same streams of messages as `serving.client.Client`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.engine import Options
from runtime.errors import InvalidInput
from runtime.loading import load_model
from runtime.pipeline import Event, drive
from runtime.placement import Wishes
from serving import messages
from serving.enginecast_pb import chat_pb2, image_pb2
from serving.job import Job, Kind, Model


class Local:
    """A loaded bundle. Raises what loading raises; every method raises from `runtime.errors`. The model named in a request is ignored."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @classmethod
    def open(cls, root: Path, target: str | None = None, options: Options | None = None, wishes: Wishes | None = None) -> Local:
        """Load the bundle at `root` for a target, or for the best usable one."""
        return cls(load_model(root, target, options, wishes))

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def generate(self, request: image_pb2.GenerateRequest) -> Iterator[image_pb2.GenerateResponse]:
        """Draw pictures: what ImageService.Generate streams, but for Queued."""
        stream = messages.ImageStream()
        return (response for event in self._run("diffusion", messages.image_request(request)) if (response := stream.response(event)))

    def chat(self, request: chat_pb2.ChatRequest) -> Iterator[chat_pb2.ChatResponse]:
        """Answer the last message: what ChatService.Chat streams, but for Queued."""
        stream = messages.ChatStream()
        return (response for event in self._run("chat", messages.chat_request(request)) if (response := stream.response(event)))

    def _run(self, kind: Kind, request: Any) -> Iterator[Event]:
        if self._model.kind != kind:
            raise InvalidInput("bundle", f"holds a {self._model.kind} model, expected a {kind} model")
        return Job(self._model, self._model.pipeline(request), drive).events()
