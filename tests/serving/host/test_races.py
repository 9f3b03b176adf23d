"""Requests, changes of models and changes of their folder, all at once and at random."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from runtime.bundle.manifest import Bundle
from runtime.errors import BundleError, DeadlineExceeded, NotFound, ResourceExhausted, Unavailable
from runtime.tasks.image import ImageReady, ImageRequest
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.offers import Limits
from serving.host.repository import Repository
from serving.host.residency import Memory, Needs
from serving.host.states import ModelState
from serving.host.terms import Priority, Terms
from tests.fakes.serving import FakeModel, bundle

NAMES = ("a", "b@1", "b@2", "c")
EXPECTED = (BundleError, DeadlineExceeded, NotFound, ResourceExhausted, Unavailable)


class World:
    """Models of 60 bytes that are closed when they are unloaded, of which two fit into memory; one load in 10 fails."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.chance = random.Random(seed)
        self.made: list[FakeModel] = []
        self.most = 0
        self.ends = Counter[str]()
        self.host = ModelHost([], self._load, Limits(max_queue=64), memory=Memory(130, lambda *_: Needs({"gpu": 60})))

    def _load(self, opened: Bundle, target: str | None) -> FakeModel:
        if self.chance.random() < 0.1:
            raise BundleError("is damaged")
        model = FakeModel()
        self.made.append(model)
        self.most = max(self.most, sum(not one.closed for one in self.made))
        return model

    def write(self, name: str) -> None:
        folder = self.root / name.replace("@", "/")
        shutil.rmtree(folder, ignore_errors=True)
        made = bundle(self.root, f".new/{name}").root
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)

    def pick(self) -> str:
        return self.chance.choice((*NAMES, "b"))

    async def client(self) -> None:
        for _ in range(25):
            seed, steps = self.chance.randrange(1000), self.chance.randint(1, 3)
            keep, leaves = self.chance.choice((None, 0, 0.01, 5)), self.chance.random() < 0.3
            try:
                terms = Terms(keep, self.chance.choice(list(Priority)), finish=self.chance.random() < 0.1)
                events = self.host.run(self.pick(), ImageRequest("x", seed=seed, steps=steps), 5, str(seed), terms)
                async with aclosing(events):
                    pictures, last = [], None
                    async for last in events:
                        pictures += [last.seed] if isinstance(last, ImageReady) else []
                        if leaves:
                            break
                assert leaves or (isinstance(last, Done) and pictures == [seed])
                self.ends["left" if leaves else "done"] += 1
            except EXPECTED as error:
                self.ends[type(error).__name__] += 1
                await asyncio.sleep(0.003)

    async def operator(self) -> None:
        for _ in range(30):
            change = self.chance.choice((self.host.load, self.host.load, self.host.reload, self.host.unload))
            with suppress(*EXPECTED):
                await change(self.pick())
            await asyncio.sleep(0.003)

    async def builder(self) -> None:
        for _ in range(15):
            name = self.chance.choice(NAMES)
            if self.chance.random() < 0.3:
                shutil.rmtree(self.root / name.replace("@", "/"), ignore_errors=True)
            else:
                self.write(name)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.host.following.POLL_SECONDS", 0.005)
    monkeypatch.setattr("serving.host.served.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("serving.host.loading.measured", lambda bundle, needs, growth: needs.all)
    world = World(tmp_path, seed)
    for name in NAMES:
        world.write(name)

    async def work() -> None:
        host = world.host
        host.follow(Repository(tmp_path))
        async with asyncio.timeout(30):
            await asyncio.gather(*(world.client() for _ in range(12)), world.operator(), world.builder())
            for name in NAMES:
                world.write(name)
            while any(served.changes or served.places for served in (*host.catalog, *host.lifecycle.loaded)):
                await asyncio.sleep(0.01)
            while sorted(status.name for status in host.statuses()) != sorted(NAMES):
                await asyncio.sleep(0.01)
            for name in NAMES:
                while True:
                    try:
                        await host.load(name)
                        break
                    except EXPECTED:
                        await asyncio.sleep(0.01)
        assert world.ends["done"] > 10 and world.ends["left"] > 5, world.ends
        held = [status for status in host.statuses() if status.state is ModelState.READY]
        assert len(held) == 2, "as many as fit"
        assert all(status.running == status.queued == 0 for status in host.statuses())
        assert await host.close(1)
        assert all(model.closed for model in world.made) and not host.lifecycle.loaded

    asyncio.run(work())
    assert world.most <= 3, "two, and one that was made while another was closed"
