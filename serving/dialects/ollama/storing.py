"""Changes of the server's repository and library: /api/pull, /api/push, /api/copy, /api/delete, /api/create."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final, TypeVar

from starlette.responses import JSONResponse, Response

from runtime.errors import BundleError, ResourceExhausted
from runtime.files import file_error
from serving.dialects.http.running import Lines, LineStream
from serving.dialects.ollama import fields, names
from serving.dialects.ollama.listing import named
from serving.dialects.ollama.replies import NDJSON, Fields, Pieces, failure, line
from serving.dialects.ollama.stores import Stores
from serving.host.building import built
from serving.host.models import ModelHost
from serving.host.offers import Offer
from serving.host.repository import Repository
from serving.host.shown import concealed
from serving.host.storing import copying, place, remove

T = TypeVar("T")
SUCCESS: Final[Fields] = {"status": "success"}
SHOWN: Final = 12
"""Digits of a digest in a status."""


class Storing:
    """Changes what lies in the repository of a host."""

    def __init__(self, host: ModelHost, stores: Stores) -> None:
        self._host = host
        self._stores = stores
        self._building = asyncio.Lock()

    async def pull(self, body: fields.Pull) -> Response:
        """Copy a bundle from the library, if it is not here already."""
        offer = await asyncio.to_thread(self._stores.bundle, named(body))
        present = self._host.catalog.get(offer.name)
        if present is not None and present.offer.same(offer):
            return await _response(_nothing(), body.stream)
        return await _response(self._copied(offer, self._stores.repository, offer.model, offer.version), body.stream)

    async def push(self, body: fields.Push) -> Response:
        """Copy a bundle that is served to the library, if it is not there already."""
        offer, library = self._host.catalog.find(names.known(self._host, named(body))).offer, self._stores.library
        there = {one.name: one for one in (await asyncio.to_thread(library.look)).offers}
        if offer.name in there and there[offer.name].same(offer):
            return await _response(_nothing(), body.stream)
        return await _response(self._copied(offer, library, offer.model, offer.version, "pushing"), body.stream)

    async def copy(self, body: fields.Copy) -> Response:
        """Copy a bundle that is served to another name, or to a new version."""
        offer = self._host.catalog.find(names.known(self._host, body.source)).offer
        copied = self._copied(offer, self._stores.repository, *names.storable(body.destination))
        async with aclosing(copied) as steps:
            async for _ in steps:
                pass
        return Response()

    async def delete(self, body: fields.Name) -> Response:
        """Take a bundle out of the repository, or all bundles that one is chosen of."""
        root = self._stores.repository.root
        offer = self._stores.own(named(body))
        await asyncio.to_thread(remove, offer.root if offer.version else root / offer.model, root)
        await self._host.look()
        return Response()

    async def create(self, body: fields.Create) -> Response:
        """Build a bundle of a checkpoint."""
        source = await asyncio.to_thread(self._stores.checkpoint, body.from_)
        model, version = names.storable(named(body))
        to = place(self._stores.repository, model, version)
        if self._building.locked():
            raise ResourceExhausted("another bundle is being built: try again when that is done")
        return await _response(self._built(source, to, model, body.quantize or ""), body.stream)

    def _copied(self, offer: Offer, store: Repository, model: str, version: str, doing: str = "pulling") -> Pieces:
        """Copy a bundle to a store, as this model and version. Raises InvalidInput at once where that is taken."""
        return self._copying(offer, place(store, model, version), store.root, doing)

    async def _copying(self, offer: Offer, to: Path, root: Path, doing: str) -> Pieces:
        if offer.bundle is None:
            raise offer.error or BundleError(f"the bundle of {offer.name} cannot be opened")
        yield {"status": f"{doing} manifest"}
        try:
            async with aclosing(_threaded(copying(offer.bundle, to, root))) as steps:
                async for step in steps:
                    counts = {"digest": f"sha256:{step.digest}", "total": step.total, "completed": step.completed}
                    yield {"status": f"{doing} {step.digest[:SHOWN]}", **counts}
        except OSError as error:
            raise concealed(concealed(file_error(error), offer.root, offer.name), root, root.name) from error
        except BundleError as error:
            raise concealed(error, offer.root, offer.name) from error
        await self._host.look()
        yield SUCCESS

    async def _built(self, source: Path, to: Path, model: str, quant: str) -> Pieces:
        async with self._building, aclosing(built(source, to, model, quant)) as steps:
            async for step in steps:
                yield {"status": step.text, "completed": step.number, "total": step.total}
        await self._host.look()
        yield SUCCESS


async def _nothing() -> Pieces:
    """What pulling a bundle says that is here."""
    yield SUCCESS


async def _response(pieces: Pieces, stream: bool | None) -> Response:
    """The progress, a line for each piece, or with `stream` False the last one."""
    if stream is False:
        async with aclosing(pieces):
            return JSONResponse([piece async for piece in pieces][-1])

    async def lines() -> Lines:
        async with aclosing(pieces):
            async for piece in pieces:
                yield line(piece)

    return LineStream(lines(), failure, NDJSON)


async def _threaded(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items of a generator that waits for files, each made in a thread. Closing closes it."""
    try:
        while True:
            step: asyncio.Task[T | None] = asyncio.create_task(asyncio.to_thread(next, items, None))
            try:
                item = await asyncio.shield(step)
            finally:
                if not step.done():
                    await asyncio.wait({step})
            if item is None:
                return
            yield item
    finally:
        with suppress(OSError):
            await asyncio.to_thread(items.close)
