"""A fake model whose steps a test can release one by one, and a server on loopback with two of them."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar

import numpy as np

from runtime.bundle.manifest import MANIFEST, Bundle, Manifest, Source, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Signature
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.language.calls import ToolCall
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Call, Pipeline, Progress
from runtime.scripting import Scripts
from runtime.tasks.chat import ChatRequest, Finished, TextDelta, ToolCalled
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture, decoded
from serving.dialects.grpc.client import PLAIN, Client
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.server import Server
from serving.host.models import ModelHost
from serving.host.observing import Observer
from serving.host.offers import Limits
from serving.security.protection import OPEN, Security

T = TypeVar("T")
WORDS: Final = ("a ", "red ", "círcle")


def bundle(folder: Path, name: str, task: str = ImageRequest.task) -> Bundle:
    """A bundle that has only a manifest."""
    root = folder / name
    root.mkdir(parents=True)
    source = Source(name=name, family="fake", architecture="Fake", fingerprint="")
    manifest = Manifest(
        name=name,
        key="",
        pipeline="fake",
        task=task,
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
    """Draws grey pictures with one engine call per step. After `hold`, each step waits for `let`."""

    task = ImageRequest.task
    target = "fake"
    device = "none"
    notes: tuple[str, ...] = ()
    rest: Callable[[], FakeModel] | None = None
    picture: Picture = np.full((8, 16, 3), 127, np.uint8)
    """The picture that it draws."""

    def __init__(self) -> None:
        self.engine = FakeEngine(self._step)
        self.engine.submodel = Submodel(
            name="denoiser",
            signature=Signature(inputs=(), outputs=()),
            graph="onnx/denoiser/model.onnx",
            precision=Precision.parse("int8 W8A8"),
            nbytes=0,
        )
        self.engines: Mapping[str, FakeEngine] = {"denoiser": self.engine}
        self.closed = False
        self.entered = threading.Semaphore(0)
        self._permits: threading.Semaphore | None = None
        self.failure: Exception | None = None
        self.successor: FakeModel | Exception | None = None
        """Makes the model broken: the model that is loaded in its place, or the error of loading."""

    @property
    def calls(self) -> int:
        """Steps begun so far."""
        return len(self.engine.calls)

    def hold(self) -> None:
        """From now on each step waits for `let`."""
        self._permits = threading.Semaphore(0)

    def let(self, steps: int) -> None:
        """Release this many steps."""
        assert self._permits is not None
        self._permits.release(steps)

    def release(self) -> None:
        """Release all steps and undo `hold`."""
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
        latents = None if request.denoising_end is None else np.zeros((4, 1, 2), np.float32)
        for index in range(request.images or 1):
            yield ImageReady(picture, index, (request.seed or 0) + index, latents)

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
    """A fake chat model that answers with WORDS, or where it must with a call of the first function."""

    task = ChatRequest.task

    def pipeline(self, request: Any) -> Pipeline:
        for picture in request.images:
            decoded(picture)
        for number in range(request.answers or 1):
            if request.tools is not None and request.tools.must:
                yield Call("denoiser", {})
                yield ToolCalled(ToolCall(request.tools.callable[0].name, {"of": "red"}), number, 1)
                yield Finished("stop", 7, 1, answer=number)
                continue
            for word in WORDS[: request.max_tokens or 3]:
                yield Call("denoiser", {})
                yield TextDelta(word, number, 1, _logprobs(word, request.logprobs))
            yield Finished("stop" if (request.max_tokens or 3) >= 3 else "length", 7, len(WORDS), answer=number)


def _logprobs(word: str, count: int | None) -> tuple[TokenLogprob, ...]:
    """A word as one token of probability 1/2, and the first `count` of WORDS in its place."""
    if count is None:
        return ()
    likely = [TokenLogprob(WORDS.index(one), one.encode(), math.log(0.5)) for one in (word, *WORDS)]
    return (replace(likely[0], top=tuple(likely[1 : count + 1])),)


class FakeServer:
    """A server at `address` on loopback, in its own thread, with a fake diffusion model "draw" and a fake chat model
    "talk". Models are loaded on request; with `ready`, both are loaded at the start.

    `folder` is an empty folder for the fake bundles, `options` are gRPC options, `observers` are called with all that
    happens. `security` protects the server, and `client` is connected by `connection`. `scripts` are what requests may
    name. A `with` block stops the server.
    """

    kinds: ClassVar[Mapping[str, type[FakeModel]]] = MappingProxyType({"draw": FakeModel, "talk": FakeAnswers})
    """The models by name. A subclass may have others besides."""

    def __init__(
        self,
        folder: Path,
        limits: Limits | None = None,
        options: Mapping[str, int] | None = None,
        ready: bool = False,
        observers: Sequence[Observer] = (),
        security: Security = OPEN,
        connection: Connection = PLAIN,
        scripts: Scripts | None = None,
    ) -> None:
        self.models = {name: kind() for name, kind in self.kinds.items()}
        self.loads: list[tuple[str, str | None]] = []
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.load_failure: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.stopped = False

        async def start() -> Server:
            bundles = [bundle(folder, name, model.task) for name, model in self.models.items()]
            self.host = ModelHost(bundles, self._load, limits or Limits(), observers=observers, scripts=scripts)
            server = Server(self.host, "127.0.0.1:0", options, security)
            await server.start()
            return server

        self.server = self.do(start())
        self.address = f"127.0.0.1:{self.server.port}"
        self.client = Client(self.address, connection)
        if ready:
            self.load_all()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def do(self, work: Coroutine[Any, Any, T], timeout: float = 20) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _load(self, bundle: Bundle, target: str | None) -> FakeModel:
        assert self.load_gate.wait(20)
        name = bundle.name
        self.loads.append((name, target))
        if self.load_failure is not None:
            raise self.load_failure
        self.models[name].closed = False
        return self.models[name]

    def load_all(self) -> None:
        """Load both models."""
        for name in self.models:
            self.client.load(name)

    @property
    def draw(self) -> FakeModel:
        """The fake diffusion model."""
        return self.models["draw"]

    def stop(self, grace: float = 5) -> None:
        """Stop the server as a signal does. Running requests get `grace` seconds."""
        if not self.stopped:
            self.stopped = True
            self.do(self.server.stop(grace))

    async def _finish(self) -> None:
        """Wait for the end of cancelled RPCs before the loop stops."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1)
        await self._loop.shutdown_asyncgens()

    def end(self) -> None:
        """Release all steps, stop the server and its thread."""
        for model in self.models.values():
            model.release()
        self.client.close()
        self.stop(0)
        self.do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
