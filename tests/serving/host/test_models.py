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
