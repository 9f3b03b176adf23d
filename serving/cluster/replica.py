"""A replica: a process on a node of the cluster that holds one `ModelHost`, with its scheduler, limits and memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from runtime.errors import Cancelled, EnginecastError
from runtime.placing.heap import return_freed_memory
from serving.cli.offered import host_of
from serving.cluster.wire import Call, Failure, Part
from serving.dialects.grpc.answering import responses
from serving.dialects.grpc.status import UNEXPECTED, code, note
from serving.dialects.grpc.task import grpc_tasks
from serving.host.observing import Record, recorded
from serving.observers import logs
from serving.observers.logs import RequestLog
from serving.settings import Settings

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 1.0
"""Longest time between two reports of a replica's models."""


class Replica:
    """Serves the models of its `settings`. Reports their states to the `board`, a handle of a `Board`.

    It is ready when its models are loaded. A model that fails is reported, and loaded again for a request, as by a
    server of one process.
    """

    async def __init__(self, settings: Settings, board: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.configure(settings.log_format)
        return_freed_memory(most_arenas=2)
        self._host = host_of(settings)([RequestLog()])
        self._board = board
        self._reporting = asyncio.create_task(self._report())
        await asyncio.gather(*map(self._host.load, self._host.at_start()), return_exceptions=True)

    def check_health(self) -> None:
        """Ray starts the replica anew if this raises."""
        if self._reporting.done():
            raise RuntimeError("the states of the models are not reported any more")

    async def answer(self, call: Call) -> AsyncIterator[Part | Failure]:
        """Run a request; yields its responses, and the error that ends it. Closing the generator stops the work."""
        record = Record(id=call.id, method=call.method, client=call.client, traceparent=call.traceparent)
        with recorded(record, self._host.observer):
            try:
                async with aclosing(self._parts(call, record)) as parts:
                    async for part in parts:
                        yield part
            except EnginecastError as error:
                note(record, error)
                yield Failure.of(error)
            except asyncio.CancelledError:
                record.code = code(Cancelled("")).name
                raise
            except Exception:
                log.exception("a request failed unexpectedly")
                record.code = grpc.StatusCode.INTERNAL.name
                yield Failure.of(EnginecastError(UNEXPECTED))

    async def _parts(self, call: Call, record: Record) -> AsyncGenerator[Part, None]:
        task = grpc_tasks()[call.task]
        message = GetMessageClass(task.method.input_type).FromString(call.message)
        first = True
        async with aclosing(responses(self._host, task, message, call.timeout, call.client)) as found:
            async for response in found:
                yield Part(response.SerializeToString(), first, record.first_output is not None)
                first = False

    async def _report(self) -> None:
        """Tell the board the states of the models, at once when one changes."""
        name = serve.get_replica_context().replica_id.unique_id
        while True:
            changed = self._host.changed
            with suppress(RayError, RayServeException):  # the board is started anew if its node is lost
                await self._board.report.remote(name, self._host.statuses())
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), REPORT_SECONDS)
