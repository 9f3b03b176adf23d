"""The models of a cluster as the ingress sees them: their states, and a replica's answer to a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Any, Final

from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from runtime.errors import (
    Cancelled,
    EnginecastError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
    did_you_mean,
    quoted,
)
from serving.cluster.wire import Call, Failure, Overview, Part
from serving.dialects.grpc.status import UNEXPECTED
from serving.host.loading import STOPPING
from serving.host.offers import VERSION_MARK
from serving.host.states import ModelState, Status

log = logging.getLogger(__name__)

BOARD: Final = "(board)"
"""The application of the board. The other applications have the names of their models."""
REPOSITORY: Final = "(repository)"
"""The application whose replicas each serve all models of the repository."""
LOOK_SECONDS: Final = 1.0
"""Time between two looks at the board."""
RETRY_SECONDS: Final = 1.0
"""When a client that found all replicas busy may try again."""
TRIES: Final = 4
"""Replicas that a request is sent to before it fails, if the former ones are lost."""


class View:
    """The `Models` of a cluster. Made on the event loop of the ingress."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._overview = Overview()
        self._handles: dict[str, Any] = {}
        self._looked = asyncio.Event()
        self._looking = asyncio.create_task(self._look())

    @property
    def stopping(self) -> bool:
        """Whether the cluster stops."""
        return self._overview.stopping

    def statuses(self) -> list[Status]:
        """The status of every model, sorted by name."""
        return list(self._overview.statuses)

    def status(self, name: str) -> Status:
        """The status of a model. Raises NotFound with the nearest name."""
        found = self._by_name()
        if name not in found:
            raise self._unknown(name)
        return found[name]

    def ready(self) -> dict[str, str | None]:
        """The task of each model, None if it cannot be used now, as in `ModelHost.ready`."""
        found = self._by_name().items()
        return {name: status.task if _usable(status) and not self.stopping else None for name, status in found}

    async def answers(self, model: str, call: Call, key: str) -> AsyncGenerator[Part, None]:
        """The responses of a replica to a request. Those with the same `key` go to the same replica, "" to any. Closing
        the generator stops the work.

        If the replica is lost before the first part of the result, another one gets the request. Raises NotFound,
        Unavailable if the replica was lost later or the cluster stops, ResourceExhausted if too many requests wait, and
        what the replica raised.
        """
        app = await self._application(model)
        session = model if app == REPOSITORY else key  # a repository's replica that has the model loaded
        deadline = None if call.timeout is None else monotonic() + call.timeout
        output, started = False, False
        for tries in range(1, TRIES + 1):
            left = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                async with aclosing(self._answer(app, replace(call, timeout=left), session)) as parts:
                    async for part in parts:
                        if not (part.first and started):
                            yield part
                        started, output = True, part.output
                return
            except Lost as error:
                if output or tries == TRIES:
                    raise Unavailable(
                        f"the replica that answered was lost ({error}): send the request again"
                    ) from error
                log.warning("a replica of %s was lost before it answered: the request goes to another", model)

    async def _answer(self, app: str, call: Call, session: str) -> AsyncGenerator[Part, None]:
        """The responses of one replica. Raises Lost if the replica or its node went away."""
        handle = await self._handle(app)
        with _raised():
            responses = handle.options(stream=True, method_name="answer", session_id=session).remote(call)
            try:
                async for part in responses:
                    if isinstance(part, Failure):
                        raise part.error()
                    yield part
            finally:
                responses.cancel()

    async def _application(self, model: str) -> str:
        """The application that serves a model. Raises NotFound, InvalidInput without a name."""
        await self._looked.wait()
        if self.stopping:
            raise Unavailable(STOPPING)
        if not model:
            raise InvalidInput("model", f"is missing: name one of {', '.join(sorted(self._by_name()))}")
        if model in self._overview.named:
            return model
        others = self._by_name().keys() - set(self._overview.named)
        # With no replica of the repository running, none reported what there is.
        if model in others or (self._overview.repository and not others):
            return REPOSITORY
        raise self._unknown(model)

    def _unknown(self, name: str) -> NotFound:
        return NotFound(f"model {quoted(name)} is not served here: {did_you_mean(name, self._by_name())}")

    def _by_name(self) -> dict[str, Status]:
        """The status of each model. Default versions also have the name without the version."""
        statuses = self._overview.statuses
        defaults = {status.name.rpartition(VERSION_MARK)[0]: status for status in statuses if status.is_default}
        return defaults | {status.name: status for status in statuses}

    async def _handle(self, app: str) -> Any:
        if app not in self._handles:
            # It asks the controller, and waits for it.
            self._handles[app] = await asyncio.to_thread(serve.get_app_handle, app)
        return self._handles[app]

    async def _look(self) -> None:
        """Follow the board. While it cannot be reached, what it said last counts."""
        while True:
            with suppress(RayError, RayServeException):
                handle = await self._handle(BOARD)
                overview = await handle.overview.remote()
                if overview != self._overview:
                    self._overview = overview
                    self.changed.set()
                    self.changed = asyncio.Event()
                self._looked.set()
            await asyncio.sleep(LOOK_SECONDS)


class Lost(Exception):
    """The replica that had a request is gone."""


def _usable(status: Status) -> bool:
    return status.state is ModelState.READY or status.on_demand


@contextmanager
def _raised() -> Iterator[None]:
    """Raise Ray's errors as ours."""
    try:
        yield
    except BackPressureError:
        raise ResourceExhausted("as many requests wait for this model as may: try again later", RETRY_SECONDS) from None
    except DeploymentUnavailableError:
        raise Unavailable("no replica of this model can be started: the cluster's log says why") from None
    except TaskCancelledError:
        raise Cancelled("the request was cancelled in the cluster") from None
    except RayTaskError as error:  # a fault of a replica's code, which answers errors as responses
        log.exception("a replica failed unexpectedly")
        raise EnginecastError(UNEXPECTED) from error
    except RayError as error:
        raise Lost(type(error).__name__) from error
