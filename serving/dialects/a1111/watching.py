"""How far jobs are, and stopping them: by polling as the web UI's clients do, and over a WebSocket.

Without an id, a client sees its own newest job with its preview; of the jobs of others, only how far the oldest is.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.websockets import WebSocket

from runtime import limits
from runtime.errors import InvalidInput, NotFound, quoted
from serving.dialects.a1111.clients import Client, Sender, sender
from serving.dialects.a1111.fields import Command, TaskId, TaskProgress
from serving.dialects.a1111.jobs import Job, Jobs
from serving.dialects.http.pictures import file_text
from serving.dialects.http.sockets import Messages, admitted

URL: Final = "data:image/png;base64,"
NOTHING: Final = {"job": "", "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
"""The state where no job runs."""
QUERY: Final = frozenset({"skip_current_image", "id_task"})


async def report(job: Job | None, own: bool = True, picture: bool = True) -> dict[str, Any]:
    """What GET /sdapi/v1/progress says of a job. Of another client's job it has neither the id nor the picture."""
    if job is None:
        state = {**NOTHING, "skipped": False, "interrupted": False, "stopping_generation": False}
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    state = {
        "skipped": job.skipped,
        "interrupted": job.interrupted,
        "stopping_generation": False,
        "job": job.name,
        "job_count": 0 if job.ended else job.count,
        "job_timestamp": job.timestamp,
        "job_no": job.number,
        "sampling_step": job.step,
        "sampling_steps": job.steps,
    }
    shown = await file_text(job.preview) if own and picture and job.preview is not None else None
    return {
        "progress": job.progress,
        "eta_relative": job.eta,
        "state": state | ({"id_task": job.id} if own else {}),
        "current_image": shown,
        "textinfo": None if job.began else "Queued...",
    }


async def news(job: Job | None, seen: int, picture: bool = True) -> dict[str, Any]:
    """What /internal/progress says of a job whose preview number `seen` the client has already."""
    if job is None or job.ended or job.began is None:
        completed = job is not None and job.ended
        text = "Waiting..." if job is None or completed else "Queued..."
        return {
            "active": False,
            "queued": not completed and job is not None,
            "completed": completed,
            "paused": False,
            "progress": 1.0 if completed else 0.0,
            "eta": None,
            "live_preview": None,
            "id_live_preview": -1,
            "textinfo": text,
        }
    number, preview = job.shown, job.preview if picture and job.shown != seen else None
    return {
        "active": True,
        "queued": False,
        "completed": False,
        "paused": False,
        "progress": job.progress,
        "eta": job.eta or None,
        "live_preview": None if preview is None else URL + await file_text(preview),
        "id_live_preview": seen if preview is None else number,
        "textinfo": None,
    }


def add(routes: APIRouter, jobs: Jobs) -> None:
    """Add the endpoints."""

    @routes.get("/sdapi/v1/progress")
    async def progress(
        request: Request, client: Sender, skip_current_image: bool = False, id_task: str = ""
    ) -> dict[str, Any]:
        for name in (name for name in request.query_params if name not in QUERY):
            raise InvalidInput(name[: limits.NAME.most], "is not known here: leave it out")
        if id_task:
            return await report(jobs.find(client, id_task), picture=not skip_current_image)
        if own := jobs.own(client):
            return await report(own[-1], picture=not skip_current_image)
        return await report(next(iter(jobs.running()), None), own=False)

    @routes.post("/internal/progress")
    async def task_progress(message: TaskProgress, client: Sender) -> dict[str, Any]:
        return await news(jobs.get(client, message.id_task), message.id_live_preview, message.live_preview)

    @routes.post("/sdapi/v1/interrupt")
    async def interrupt(client: Sender, message: TaskId | None = None) -> dict[str, Any]:
        jobs.stop(client, message.id_task if message else None)
        return {}

    @routes.post("/sdapi/v1/skip")
    async def skip(client: Sender, message: TaskId | None = None) -> dict[str, Any]:
        jobs.stop(client, message.id_task if message else None, skip=True)
        return {}

    @routes.websocket("/sdapi/v1/ws/progress/{id_task}")
    async def watch(socket: WebSocket, id_task: str) -> None:
        async with admitted(socket) as messages:
            await _watched(jobs, sender(socket), id_task, messages)


async def _watched(jobs: Jobs, client: Client, id: str, messages: Messages) -> None:
    """Send what `news` says of a job whenever it changes, until it has ended. The client may stop it meanwhile."""
    job, seen = await _job(jobs, client, id, messages), -1
    commands = asyncio.ensure_future(_commands(job, messages))
    try:
        while True:
            changed = asyncio.ensure_future(job.changed.wait())
            sent = await news(job, seen)
            seen = max(seen, sent["id_live_preview"])
            await messages.send({"id_task": job.id, **sent, "interrupted": job.interrupted})
            if sent["completed"]:
                changed.cancel()
                return
            await asyncio.wait({changed, commands}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if commands.done():
                return commands.result()
    finally:
        commands.cancel()
        await asyncio.wait({commands})


async def _job(jobs: Jobs, client: Client, id: str, messages: Messages) -> Job:
    """The job of an id, which may begin a moment later. Raises NotFound."""
    limits.JOB_ID.length("id_task", id)
    try:
        async with asyncio.timeout(limits.ARRIVAL.most):
            while (job := jobs.get(client, id)) is None:
                began = jobs.began
                await messages.send({"id_task": id, **await news(None, -1), "interrupted": False})
                await began.wait()
    except TimeoutError:
        raise NotFound(f"no job {quoted(id)} has begun: send it as force_task_id") from None
    return job


async def _commands(job: Job, messages: Messages) -> None:
    """Do what the client sends, until it leaves. Raises InvalidInput for what is no command."""
    async for text in messages:
        try:
            command = Command.model_validate_json(text)
        except ValidationError:
            raise InvalidInput("message", 'is no command, expected {"command": "interrupt"} or "skip"') from None
        job.stop(skip=command.command == "skip")
