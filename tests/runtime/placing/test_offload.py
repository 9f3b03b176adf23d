"""Engines that take turns, on engines made of functions: who goes, who stays, who waits."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Signature
from runtime.engine import Engine, FakeEngine, Slot
from runtime.errors import EngineError, ResourceExhausted
from runtime.placing.memory import Need
from runtime.placing.offload import Budget, OffloadedEngine

EMPTY: Mapping[str, Array] = {}


class Loads:
    """Engines that count how often they are loaded, and know how many are loaded at once."""

    def __init__(self, room: int | None = 100) -> None:
        self.budget = Budget({} if room is None else {"cpu": room})
        self.now: list[str] = []
        self.order: list[str] = []
        self.failure: Exception | None = None

    def make(
        self,
        name: str,
        size: int,
        run: Callable[[Mapping[str, Array]], dict[str, Array]] = lambda inputs: {},
        where: str = "cpu",
    ) -> OffloadedEngine:
        submodel = Submodel(
            name=name,
            signature=Signature(inputs=(), outputs=()),
            graph="g",
            precision=Precision.parse("int8"),
            nbytes=size,
        )
        loads = self

        class Fake(FakeEngine):
            device = "fake:cpu"
            fallbacks = ("1 of 2 nodes on the CPU",)

            def close(self) -> None:
                loads.now.remove(name)

        def load() -> Engine:
            if self.failure is not None:
                raise self.failure
            self.now.append(name)
            self.order.append(name)
            return Fake(run)

        return OffloadedEngine(submodel, "fake", where, self.budget, size, load)


def test_what_was_used_longest_ago_makes_room() -> None:
    loads = Loads()
    text, unet, vae = loads.make("text", 40), loads.make("unet", 60), loads.make("vae", 30)
    text.run(EMPTY)
    unet.run(EMPTY)
    assert loads.now == ["text", "unet"], "both fit"
    vae.run(EMPTY)
    assert loads.now == ["unet", "vae"]
    text.run(EMPTY)
    assert loads.now == ["vae", "text"] and loads.order == ["text", "unet", "vae", "text"]
    assert (text.loads, text.target, text.device, text.fallbacks) == (
        2,
        "fake",
        "fake:cpu",
        ("1 of 2 nodes on the CPU",),
    )
    assert text.reload_seconds > 0 == unet.reload_seconds


def test_memories_do_not_disturb_each_other() -> None:
    loads = Loads()
    here, there = loads.make("here", 90), loads.make("there", 90, where="cuda:0")
    here.run(EMPTY)
    there.run(EMPTY)
    assert loads.now == ["here", "there"]


def test_activations_count(caplog: pytest.LogCaptureFixture) -> None:
    """Two bytes for each byte of inputs: 20 bytes of them push the other out, none do not."""
    loads = Loads()
    text, vae = loads.make("text", 40), loads.make("vae", 30)
    vae.need = Need(30, 2.0)
    text.run(EMPTY)
    vae.run({"latents": np.zeros(10, np.uint8)})
    assert loads.now == ["text", "vae"]
    vae.run({"latents": np.zeros(20, np.uint8)})
    assert loads.now == ["vae"]
    vae.run({"latents": np.zeros(10**6, np.uint8)})
    assert vae.taken == 100, "nothing is refused for what activations are thought to take"
    assert [record.message for record in caplog.records] == [
        "vae needs an estimated 1.9 MiB for this call, 100 B are allowed"
    ]


def test_too_large_for_the_room() -> None:
    loads = Loads()
    huge = loads.make("huge", 101)
    with pytest.raises(
        ResourceExhausted, match="huge needs 101 B of memory, 100 B are allowed: allow more with --memory-limit"
    ):
        huge.run(EMPTY)
    assert not loads.now


def test_states_that_somebody_holds_stay() -> None:
    loads = Loads()
    decoder, vision, slot = loads.make("decoder", 60), loads.make("vision", 60), Slot()
    decoder.run(EMPTY, slot)
    with pytest.raises(
        ResourceExhausted,
        match=r"vision needs 60 B of memory, 100 B are allowed, 60 B of it held by the states of decoder",
    ):
        vision.run(EMPTY)
    del slot
    gc.collect()
    vision.run(EMPTY)
    assert loads.now == ["vision"]


def test_a_slot_that_begins_anew_holds_nothing() -> None:
    loads = Loads()
    decoder, vision, slot = loads.make("decoder", 60), loads.make("vision", 60), Slot()
    decoder.run(EMPTY, slot)
    decoder.trim(slot, 0)
    vision.run(EMPTY)
    assert loads.now == ["vision"]


def test_an_engine_that_runs_is_waited_for() -> None:
    loads = Loads()
    running, go = threading.Event(), threading.Event()

    def slow(inputs: Mapping[str, Array]) -> dict[str, Array]:
        running.set()
        assert go.wait(10) and "unet" in loads.now
        return {}

    unet, vae = loads.make("unet", 60, slow), loads.make("vae", 60)
    first = threading.Thread(target=unet.run, args=(EMPTY,))
    second = threading.Thread(target=vae.run, args=(EMPTY,))
    first.start()
    assert running.wait(10)
    second.start()
    time.sleep(0.05)
    assert loads.now == ["unet"]
    go.set()
    first.join(10)
    second.join(10)
    assert loads.now == ["vae"]


def test_a_failure_leaves_nothing() -> None:
    loads = Loads()
    text, unet = loads.make("text", 60), loads.make("unet", 60)
    text.run(EMPTY)
    loads.failure = EngineError("out of order")
    with pytest.raises(EngineError, match="out of order"):
        unet.run(EMPTY)
    loads.failure = None
    unet.run(EMPTY)
    assert loads.now == ["unet"]
    unet.close()
    text.close()
    assert not loads.now


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    calls=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=30),
    room=st.integers(60, 120),
)
def test_the_room_is_never_exceeded(sizes: list[int], calls: list[tuple[int, int]], room: int) -> None:
    loads = Loads(room)
    engines = [loads.make(str(index), size) for index, size in enumerate(sizes)]
    for engine in engines:
        engine.need = Need(engine.need.base, 1.0)
    for index, inputs in calls:
        called = engines[index % len(engines)]
        called.run({"x": np.zeros(inputs, np.uint8)})
        assert called.loaded and sum(one.taken for one in engines) <= room
        assert loads.now == sorted(loads.now, key=loads.now.index) and set(loads.now) == {
            str(i) for i, one in enumerate(engines) if one.loaded
        }
