"""Changes of a model's state, without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runtime.errors import Unavailable
from serving.host.models import ModelHost
from serving.host.states import ModelState
from tests.fakes.serving import FakeModel, bundle


def test_a_change_has_its_state_at_once(tmp_path: Path) -> None:
    """Two calls in one turn of the event loop: the second reads the state of the first, not the one before."""

    async def change() -> None:
        host = ModelHost([bundle(tmp_path, "draw")], lambda *_: FakeModel())
        _, early = await asyncio.gather(host.load("draw"), host.unload("draw"), return_exceptions=True)
        assert isinstance(early, Unavailable) and "is loading" in str(early)
        assert host.status("draw").state is ModelState.READY
        _, late = await asyncio.gather(host.unload("draw"), host.load("draw"), return_exceptions=True)
        assert isinstance(late, Unavailable) and "is unloading" in str(late)
        assert host.status("draw").state is ModelState.UNLOADED
        await host.close()

    asyncio.run(change())


def test_who_waits_for_a_state_may_change_it(tmp_path: Path) -> None:
    """A model that reads ready can be unloaded at once, and one that reads unloaded be loaded."""

    async def change() -> None:
        host = ModelHost([bundle(tmp_path, "draw")], lambda *_: FakeModel())

        async def become(state: ModelState) -> None:
            while host.status("draw").state is not state:
                await host.changed.wait()

        loading = asyncio.create_task(host.load("draw"))
        await become(ModelState.READY)
        unloading = asyncio.create_task(host.unload("draw"))
        await become(ModelState.UNLOADED)
        await host.load("draw")
        await asyncio.gather(loading, unloading)
        assert host.status("draw").state is ModelState.READY
        await host.close()

    asyncio.run(change())
