"""What is unloaded to make room, without loading anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from runtime.bundle.manifest import Bundle
from runtime.errors import ResourceExhausted
from serving.host.offers import ENDLESS, Limits, Offer
from serving.host.residency import KeepAlive, Memory, Needs, measured
from serving.host.served import Served
from serving.host.states import ModelState
from tests.fakes.serving import FakeModel, bundle

MOST = 100


def memory(most: int | None = MOST) -> Memory:
    return Memory(most, lambda *_: Needs({"cpu": 40}))


def loaded(name: str, used: float, cpu: int = 40, keep_alive: float | None = ENDLESS, **others: int) -> Served:
    served = Served(Offer(name, Path(name), keep_alive=keep_alive), Limits())
    served.state, served.model, served.last_used = ModelState.READY, FakeModel(), used
    served.memory = {"cpu": cpu, **others}
    return served


def test_nothing_goes_while_there_is_room() -> None:
    assert memory().surplus("new", {"cpu": 60}, [loaded("a", 1)]) is None
    assert memory(None).surplus("new", {"cpu": 10_000}, [loaded("a", 1)]) is None


def test_the_least_recently_used_goes_first() -> None:
    models = [loaded("a", 3), loaded("b", 1), loaded("c", 2, cpu=20)]
    found = memory().surplus("new", {"cpu": 40}, models)
    assert found is models[1]
    assert memory().surplus("new", {"cpu": 40}, [models[0], models[2]]) is None


def test_only_what_holds_the_memory_that_is_short() -> None:
    elsewhere, here = loaded("a", 1, cpu=0, gpu=90), loaded("b", 2, cpu=90)
    assert memory().surplus("new", {"cpu": 40}, [elsewhere, here]) is here
    assert memory().surplus("new", {"gpu": 40}, [elsewhere, here]) is elsewhere


@pytest.mark.parametrize("why", ["busy", "changes", "is reloaded", "stays"])
def test_what_is_in_use_or_stays_does_not_go(why: str) -> None:
    old, new = loaded("old", 1, cpu=50, keep_alive=None if why == "stays" else 5), loaded("new", 2, cpu=50)
    place = old.enter("client", 0) if why == "busy" else None

    async def choose() -> None:
        task = asyncio.create_task(asyncio.sleep(0))
        old.change = task if why == "changes" else None
        old.replacing = task if why == "is reloaded" else None
        assert memory().surplus("more", {"cpu": 50}, [old, new]) is new
        with pytest.raises(ResourceExhausted, match=r"needs 60 B of cpu memory, and 50 B of .* by old,") as caught:
            memory().surplus("more", {"cpu": 60}, [old, new])
        assert caught.value.retry_seconds
        await task

    asyncio.run(choose())
    if place is not None:
        old.leave(place)
        assert memory().surplus("more", {"cpu": 60}, [old, new]) is old


def test_what_does_not_fit_alone_is_refused_with_figures() -> None:
    with pytest.raises(
        ResourceExhausted, match=r"big needs 101 B of cpu memory, with what its caches may hold, more than the 100 B"
    ):
        memory().surplus("big", {"cpu": 101}, [loaded("a", 1)])


def test_the_needs_are_estimated_only_under_a_limit(tmp_path: Path) -> None:
    one = bundle(tmp_path, "one")

    def estimate(opened: Bundle, target: str | None) -> Needs:
        assert opened is one
        return Needs({"cpu": 7})

    assert Memory(5, estimate).needs(one, None) == Needs({"cpu": 7})
    assert Memory(None, estimate).needs(one, None) == Needs()
    assert measured(one, Needs({"cpu": 7, "gpu": 3}), 20) == {"cpu": 20, "gpu": 3}


def test_caches_count_with_all_that_they_may_hold(tmp_path: Path) -> None:
    """They are empty when the growth of the process is measured, and fill later."""
    needs = Needs({"cpu": 7, "gpu": 3}, {"cpu": 10, "gpu": 30})
    assert needs.all == {"cpu": 17, "gpu": 33}
    assert measured(bundle(tmp_path, "one"), needs, 20) == {"cpu": 30, "gpu": 33}


class TestKeepAlive:
    @staticmethod
    def unloaded(served: Served, *uses: float | None, wait: float = 0.05) -> bool:
        """Whether the model was unloaded a moment after uses with these keep-alives."""
        gone = []

        async def unload(one: Served) -> None:
            gone.append(one)

        async def use() -> None:
            keeping = KeepAlive(unload)
            for seconds in uses:
                keeping.used(served, seconds)
            await asyncio.sleep(wait)
            keeping.close()

        asyncio.run(use())
        return bool(gone)

    def test_it_is_over(self) -> None:
        assert self.unloaded(loaded("a", 1, keep_alive=0.01), None)
        assert self.unloaded(loaded("a", 1, keep_alive=60), 0)

    def test_it_is_not_over(self) -> None:
        assert not self.unloaded(loaded("a", 1, keep_alive=60), None)
        assert not self.unloaded(loaded("a", 1, keep_alive=ENDLESS), None)
        assert not self.unloaded(loaded("a", 1, keep_alive=0), ENDLESS)

    def test_the_last_request_counts(self) -> None:
        assert not self.unloaded(loaded("a", 1, keep_alive=0.01), None, 60)
        assert self.unloaded(loaded("a", 1, keep_alive=60), 60, 0.01)

    def test_what_stays_is_not_unloaded_by_a_request(self) -> None:
        assert not self.unloaded(loaded("a", 1, keep_alive=None), 0)

    def test_what_is_in_use_is_not_unloaded(self) -> None:
        served = loaded("a", 1, keep_alive=0)
        served.enter("client", 0)
        assert not self.unloaded(served, None)
