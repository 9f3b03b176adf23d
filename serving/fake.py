"""Fakes to test servers and clients with: a model whose steps are let through one by one, and a server on loopback that
serves two.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from runtime.bundle.manifest import MANIFEST, Bundle, Manifest, Source, Submodel
from runtime.bundle.signature import Array, Signature
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.pipeline import Call, Pipeline, Progress
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.server import Server
from serving.enginecast_pb import image_pb2
from serving.host.models import Limits, ModelHost

T = TypeVar("T")
WORDS: Final = ("a ", "red ", "círcle")


def bundle(folder: Path, name: str) -> Bundle:
    """A bundle with a manifest and nothing else."""
    root = folder / name
    root.mkdir()
    source = Source(name=name, family="fake", architecture="Fake", fingerprint="")
    manifest = Manifest(
        name=name,
        key="",
        pipeline="fake",
        task=ImageRequest.task,
        quant="none",
        source=source,
        submodels=(),
        artifacts=(),
        config={},
        versions={},
        files={},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(root)


class FakeModel:
    """Draws grey pictures, one engine call per step. While `hold` is called, each step waits for `let`."""

    task = ImageRequest.task
    target = "fake"
    device = "none"
    notes: tuple[str, ...] = ()
    picture: Picture = np.full((8, 16, 3), 127, np.uint8)
    """What it draws."""

    def __init__(self) -> None:
        self.engine = FakeEngine(self._step)
        self.engine.submodel = Submodel(
            name="denoiser",
            signature=Signature(inputs=(), outputs=()),
            graph="onnx/denoiser/model.onnx",
            precision="int8 W8A8",
            nbytes=0,
        )
        self.engines: Mapping[str, FakeEngine] = {"denoiser": self.engine}
        self.closed = False
        self.entered = threading.Semaphore(0)
        self._permits: threading.Semaphore | None = None
        self.failure: Exception | None = None
        self.successor: FakeModel | Exception | None = None
        """What is loaded in its place when it is found broken: another model, or why none can be."""

    @property
    def calls(self) -> int:
        """Steps begun so far."""
        return len(self.engine.calls)

    def hold(self) -> None:
        self._permits = threading.Semaphore(0)

    def let(self, steps: int) -> None:
        assert self._permits is not None
        self._permits.release(steps)

    def release(self) -> None:
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release(1000)

    def _step(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        permits = self._permits
        self.entered.release()
        if permits is not None:
            assert permits.acquire(timeout=20)
        if self.failure is not None:
            raise self.failure
        return {}

    def pipeline(self, request: Any) -> Pipeline:
        if request.steps is not None and not 1 <= request.steps <= 1000:
            raise InvalidInput("steps", f"is {request.steps}, expected 1 to 1000")
        return self._draw(request.steps or 4, request)

    def _draw(self, steps: int, request: Any) -> Pipeline:
        picture = self.picture
        for step in range(1, steps + 1):
            yield Call("denoiser", {})
            preview = picture if request.preview_every and step % request.preview_every == 0 else None
            yield Progress(step, steps, preview)
        for index in range(request.images or 1):
            yield ImageReady(picture, index, (request.seed or 0) + index)

    def close(self) -> None:
        self.closed = True

    def broken(self) -> tuple[str, ...]:
        return ("denoiser",) if self.successor is not None else ()

    def elsewhere(self, broken: Sequence[str]) -> FakeModel:
        self.close()
        if isinstance(self.successor, FakeModel):
            return self.successor
        raise self.successor or AssertionError("it was not broken")


class FakeAnswers(FakeModel):
    """Answers with WORDS instead."""

    task = ChatRequest.task

    def pipeline(self, request: Any) -> Pipeline:
        for picture in request.images:
            picture.decode()
        for word in WORDS[: request.max_tokens or 3]:
            yield Call("denoiser", {})
            yield TextDelta(word)
        yield Finished("stop" if (request.max_tokens or 3) >= 3 else "length", 7, len(WORDS))


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens on another thread."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)


class FakeServer:
    """A server on loopback in a thread of its own, with a fake diffusion model "draw" and a fake chat model "talk"."""

    def __init__(self, folder: Path, limits: Limits, options: Mapping[str, int] | None = None) -> None:
        self.models = {"draw": FakeModel(), "talk": FakeAnswers()}
        self.loads: list[tuple[str, str | None]] = []
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.load_failure: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.stopped = False

        async def start() -> Server:
            self.host = ModelHost([bundle(folder, name) for name in self.models], self._load, limits)
            server = Server(self.host, "127.0.0.1:0", options)
            await server.start()
            return server

        self.server = self.do(start())
        self.address = f"127.0.0.1:{self.server.port}"
        self.client = Client(self.address)

    def do(self, work: Coroutine[Any, Any, T], timeout: float = 20) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _load(self, bundle: Bundle | Path, target: str | None) -> FakeModel:
        assert self.load_gate.wait(20)
        name = bundle.name  # of the opened bundle, or of a folder where it could not be opened
        self.loads.append((name, target))
        if self.load_failure is not None:
            raise self.load_failure
        self.models[name].closed = False
        return self.models[name]

    def load_all(self) -> None:
        for name in self.models:
            self.client.load(name)

    @property
    def draw(self) -> FakeModel:
        return self.models["draw"]

    def busy(self, name: str = "draw") -> int:
        """Requests running or waiting."""
        status = self.host.status(name)
        return status.running + status.queued

    def leaving(self) -> bool:
        """Whether every request of "draw" was told to stop."""
        return all(run.job._stopped_by is not None for run in self.host._models["draw"].runs)

    def alive(self) -> bool:
        """Whether a picture can be drawn from beginning to end."""
        self.draw.release()
        self.draw.failure = None
        return list(self.client.generate(request(steps=2), timeout=10))[-1].HasField("done")

    def stop(self, grace: float = 5) -> None:
        if not self.stopped:
            self.stopped = True
            self.do(self.server.stop(grace))

    async def _finish(self) -> None:
        """Let RPCs that were cancelled last come to their end before the loop does."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1)
        await self._loop.shutdown_asyncgens()

    def end(self) -> None:
        for model in self.models.values():
            model.release()
        self.client.close()
        self.stop(0)
        self.do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def request(**fields: Any) -> image_pb2.GenerateRequest:
    return image_pb2.GenerateRequest(**{"model": "draw", "prompt": "a circle", **fields})
