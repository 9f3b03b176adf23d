"""Runs the requests of tasks: a message in, a stream of messages out, for every protocol that carries them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import Message

from runtime import limits
from runtime.errors import InvalidInput
from serving.dialects.grpc import messages
from serving.dialects.grpc.status import Context, Sending
from serving.dialects.grpc.task import GrpcTask
from serving.host.models import ModelHost
from serving.host.observing import current_client

LARGE: Final = 1 << 16
"""Messages with more bytes hold pictures and are translated in a thread."""


async def responses(
    host: ModelHost, task: GrpcTask, message: Any, timeout: float | None, client: str
) -> AsyncGenerator[Message, None]:
    """Run the request in a message; yields its responses. Raises the errors of `ModelHost.run`."""
    stream, large = task.responses(), message.ByteSize() > LARGE
    how = messages.terms_of(message)
    if how.collect:
        found = host.collect(_alone(message), task.task)
    else:
        name, terms = message.model, messages.terms(how)
        request = await asyncio.to_thread(task.request, message) if large else task.request(message)
        request = replace(request, scripts=messages.scripts(message))
        found = host.run(name, request, timeout, client, terms)
        del request
    del message  # keep only one copy of its pictures
    async with aclosing(found) as events:
        async for event in events:
            # Pictures are encoded in a thread.
            response = await asyncio.to_thread(stream.response, event) if event.nbytes else stream.response(event)
            if response is not None:
                yield response


def _alone(message: Any) -> str:
    """The id of the request whose result is collected. Raises InvalidInput for a message with anything else."""
    others = {field.name for field, _ in message.ListFields()} - {"model", "terms"}
    if others or len(message.terms.ListFields()) > 1:
        raise InvalidInput("terms.collect", "comes with another request: send that one by itself")
    limits.JOB_ID.length("terms.collect", message.terms.collect)
    id: str = message.terms.collect
    return id


async def answer(host: ModelHost, task: GrpcTask, message: Any, context: Context) -> None:
    """Run the request in a message and stream its responses over gRPC."""
    found = responses(host, task, message, context.time_remaining(), current_client())
    del message
    with Sending(context) as write:
        async with aclosing(found):
            async for response in found:
                await write(response)
