"""A bundle loaded into this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from runtime.engine import Options
from runtime.errors import Cancelled, InvalidInput, Unavailable
from runtime.files import key_of
from runtime.pipeline import Event
from runtime.placing.loading import begin_model, load_model
from runtime.placing.memory import parse_size
from runtime.placing.placement import PICTURE_CACHE, PREFIX_CACHE, PlacementOptions, parse_place
from runtime.placing.variants import chosen
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.task import Request, task
from serving.dialects.python.session import Session
from serving.dialects.python.stream import Stream
from serving.host import job
from serving.host.job import Job

log = logging.getLogger(__name__)

R = TypeVar("R")


class Model(Session):
    """A loaded bundle. Made by `enginecast.load`; a `with` block closes it.

    Several requests may run at once, from one thread or many: their steps alternate.
    """

    def __init__(self, model: job.Model, content: bytes = b"", installed: Scripts | None = None) -> None:
        self._model, self._content, self._installed = model, content, installed or Scripts()
        self._turn = threading.RLock()
        self._closed = False
        self._rest = None if model.rest is None else _Rest(model.rest)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def task(self) -> str:
        """The task that the model does: image (`generate`), chat (`chat`) or embed (`embed`, `match`)."""
        return self._model.task

    @property
    def target(self) -> str:
        """The engines that run it, such as "openvino"."""
        return self._whole.target

    @property
    def device(self) -> str:
        """The devices that run it, such as "CPU"."""
        return self._whole.device

    @property
    def identity(self) -> str:
        """A hash of the bundle's manifest, which has the hashes of its files, and of what runs it."""
        return key_of(self._content.hex(), self.target, self.device)

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the published model and from the requested placement, as sentences."""
        return tuple(self._whole.notes)

    def close(self) -> None:
        """Wait for the current step and free the engines. Unfinished requests then raise Unavailable."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._model.close()
                if self._rest is not None:
                    self._rest.join()

    @property
    def _whole(self) -> job.Model:
        """The model with all its engines. Waits for them, and raises the error of loading."""
        return self._model if self._rest is None else self._rest.model()

    def run(self, request: Request, collect: Callable[[Sequence[Event]], R]) -> Stream[R]:
        """Stream a request of the model's task; `collect` makes the result of its events. Raises InvalidInput."""
        check_task(self._model.task, request)
        request = self._with_scripts(request)
        with self._turn:
            work = Job(self._model, self._installed.open(self._model.pipeline, request))
        stop = partial(work.stop, Cancelled("the caller stopped the work"))
        return Stream(self._steps(work), stop, collect)

    def _steps(self, work: Job) -> Generator[Event, None, None]:
        """The events of a job. Takes the lock once for each."""
        events = work.events()
        try:
            while (event := self._step(events)) is not None:
                yield event
        finally:
            with self._turn:
                events.close()

    def _step(self, events: Generator[Event, None, None]) -> Event | None:
        with self._turn:
            if self._closed:
                raise Unavailable("the model was closed: load it again")
            return next(events, None)


class _Rest(threading.Thread):
    """Loads what is not there of a model that was begun, while its first request runs."""

    def __init__(self, rest: Callable[[], job.Model]) -> None:
        super().__init__(name="the rest of a model", daemon=True)
        self._load, self._found = rest, Future[job.Model]()
        self.start()

    def run(self) -> None:
        try:
            self._found.set_result(self._load())
        except BaseException as error:  # calls that wait for an engine raise it, and `model`
            if not isinstance(error, Unavailable):  # as after `close`
                log.warning("a part of the model could not be loaded: %s", error)
            self._found.set_exception(error)

    def model(self) -> job.Model:
        """The whole model. Waits for it, and raises the error of loading."""
        return self._found.result()


def load(
    bundle: str | Path,
    *,
    target: str | None = None,
    device: str = "",
    place: str | Mapping[str, str] | None = None,
    memory_limit: str | int | None = None,
    strict: bool = False,
    picture_cache: str | int | None = None,
    prefix_cache: str | int | None = None,
    threads: int = 0,
    public_key: str | Path | None = None,
    wildcards: str | Path | None = None,
    styles: str | Path | None = None,
) -> Model:
    """Load a bundle into this process. Its files are compared with their hashes first.

        with enginecast.load("bundles/mine") as model:
            model.generate("a red fox in the snow").save("fox.png")

    Args:
        bundle: Folder made by `enginecast build` or `enginecast.build`.
        target: Engine to run on, such as "openvino". None is the best one that is usable here.
        device: Device to run on, such as "cpu", "cuda:1" or "GPU.0". Empty is the target's best.
        place: Where submodels run: {"text_encoder": "cpu", "denoiser": "cuda:0"}, or the same as text,
            "text_encoder=cpu,denoiser=cuda:0".
        memory_limit: Memory that the model may take on each device, in bytes or as "4GiB".
        strict: Refuse engines that run a part of a submodel on another device.
        picture_cache: Memory for the features of pictures seen before, in bytes or as "128MiB": a picture that is shown
            to a chat model again is not encoded again. 0 holds none. None is 128MiB. Encoded prompts of an image model
            are held there, too.
        prefix_cache: Memory for what a chat model has read before, in bytes or as "1GiB": a conversation that goes on,
            or that begins with the same system prompt or picture as another, is not read again. 0 holds none. None is
            1GiB, and 0 with a `memory_limit`, beside which there can be none.
        threads: CPU threads per engine; 0 is all cores.
        public_key: PEM file of a public key. The bundle must be signed with its private key.
        wildcards: Folder of text files for the script "wildcards".
        styles: File of the script "styles", as Automatic1111's styles.csv.

    Raises:
        NotFound: There is no such folder.
        BundleError: The bundle is damaged, altered, or not signed as required.
        EngineUnavailable: No target of the bundle can be used here; the message lists why.
        EngineError: An engine failed to load.
        InvalidInput: An option is wrong; `field` names it.
        ResourceExhausted: There is not enough memory.
    """
    options, placing = Options(device=device, threads=threads), placement(place, memory_limit, strict)
    placing = with_caches(placing, picture_cache, prefix_cache)
    scripts = Scripts(Folders(_path(wildcards), _path(styles)))
    loaded = load_model(Path(bundle), target, options, placing, _path(public_key), scripts=scripts)
    return Model(loaded, loaded.bundle.content, scripts)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def open_for(
    root: Path,
    request: Request,
    target: str | None,
    options: Options,
    placing: PlacementOptions,
    scripts: Scripts | None = None,
) -> Model:
    """Load a bundle for a request. The request is checked first, because loading takes long, and begins while later
    submodels are loaded.
    """
    found = chosen(root, target, placing)
    check_task(found.bundle.manifest.task, request)
    placing = with_caches(placing, None, None)
    loaded = begin_model(found, target, options, placing, request=request, scripts=scripts)
    return Model(loaded, loaded.bundle.content, scripts)


def placement(place: str | Mapping[str, str] | None, memory_limit: str | int | None, strict: bool) -> PlacementOptions:
    """Parse placement options. Raises InvalidInput."""
    limit = None if memory_limit is None else parse_size("memory_limit", str(memory_limit))
    given = place if isinstance(place, str | None) else ",".join(f"{name}={where}" for name, where in place.items())
    return PlacementOptions(parse_place(given) if given else {}, limit, strict)


def with_caches(placing: PlacementOptions, pictures: str | int | None, prefixes: str | int | None) -> PlacementOptions:
    """With memory for features of pictures and for prefixes, None being the usual size. Raises InvalidInput."""
    limited = placing.memory_limit is not None
    usual = "0" if limited else PREFIX_CACHE
    held = parse_size("picture_cache", str(PICTURE_CACHE if pictures is None else pictures), 0)
    read = parse_size("prefix_cache", str(usual if prefixes is None else prefixes), 0)
    if limited and read:
        raise InvalidInput(
            "prefix_cache",
            "cannot be held under a memory_limit, where engines make room for one another: leave one of them out",
        )
    return replace(placing, picture_cache=held, prefix_cache=read)


def check_task(found: str, request: Request) -> None:
    """Raise InvalidInput if the request has another task than the model."""
    if found != request.task:
        raise InvalidInput("bundle", f"has the task {found}, expected {request.task}: use `{task(found).verb}`")
