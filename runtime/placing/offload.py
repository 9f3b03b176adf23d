"""Engines that share a memory too small for all of them: each is loaded when it is called and closed when another needs
its memory.

The least recently used engine is closed first: the text encoder before the denoiser, the denoiser before the VAE
decoder. An engine that runs or has caches in use stays loaded. `Engine.reload_seconds` has the time of loading again.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from weakref import WeakSet

from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot, SlotCall
from runtime.errors import ResourceExhausted
from runtime.placing import heap, memory
from runtime.placing.memory import Need, show_size

log = logging.getLogger(__name__)

Load = Callable[[], Engine]
_ticks: Final = itertools.count()


class Budget:
    """The bytes that engines may use together in each memory, by name of its device. Models may share a budget."""

    def __init__(self, rooms: Mapping[str, int]) -> None:
        self.rooms = dict(rooms)
        self._changed = threading.Condition()
        self._engines: list[OffloadedEngine] = []

    def add(self, engine: OffloadedEngine) -> None:
        with self._changed:
            self._engines.append(engine)

    def remove(self, engine: OffloadedEngine) -> None:
        with self._changed:
            self._engines.remove(engine)
            engine.put_down()
            self._changed.notify_all()

    @contextmanager
    def lend(self, engine: OffloadedEngine, inputs: int) -> Iterator[Engine]:
        """The loaded engine, with memory for inputs of this many bytes. Raises ResourceExhausted and the errors of
        loading.
        """
        with self._changed:
            self._make_room(engine, inputs)
            self._warn(engine, inputs)
            loaded = engine.pick_up()
            engine.taken = max(engine.taken, self._foreseen(engine, inputs))
            engine.uses += 1
        try:
            yield loaded
        finally:
            with self._changed:
                engine.uses -= 1
                engine.last_used = next(_ticks)
                self._changed.notify_all()

    def _warn(self, engine: OffloadedEngine, inputs: int) -> None:
        """Warn, once for each engine, if a call is estimated to need more memory than allowed."""
        need, room = engine.need.at(inputs), self.rooms.get(engine.memory)
        if room is not None and need > room and not engine.warned:
            engine.warned = True
            log.warning(
                "%s needs an estimated %s for this call, %s are allowed",
                engine.submodel.name,
                show_size(need),
                show_size(room),
            )

    def _foreseen(self, engine: OffloadedEngine, inputs: int) -> int:
        """Bytes to reserve for a call, at most the whole memory: no call is refused for the estimate of its
        activations.
        """
        room = self.rooms.get(engine.memory)
        need = engine.need.at(inputs)
        return need if room is None else max(engine.need.base, min(need, room))

    def _make_room(self, engine: OffloadedEngine, inputs: int) -> None:
        room = self.rooms.get(engine.memory)
        while room is not None:
            need = max(engine.taken, self._foreseen(engine, inputs))
            others = [
                other
                for other in self._engines
                if other is not engine and other.memory == engine.memory and other.loaded
            ]
            if sum(other.taken for other in others) + need <= room:
                return
            if idle := [other for other in others if other.idle]:
                min(idle, key=lambda other: other.last_used).put_down()
            elif engine.loaded and engine.idle and engine.taken > self._foreseen(engine, inputs):
                engine.put_down()  # frees the memory that larger inputs needed
            elif any(other.uses for other in others):
                self._changed.wait()
            else:
                held = "".join(
                    f", {show_size(other.taken)} of it held by the states of {other.submodel.name}" for other in others
                )
                raise ResourceExhausted(
                    f"{engine.submodel.name} needs {show_size(need)} of memory, {show_size(room)} are allowed{held}: "
                    "allow more with --memory-limit, or request less at once"
                )


class OffloadedEngine(Engine):
    """An engine that is loaded when it is called and closed when another engine needs its memory."""

    def __init__(self, submodel: Submodel, target: str, where: str, budget: Budget, estimated: int, load: Load) -> None:
        """`where` names the device whose memory it uses; `estimated` is the number of bytes until it is measured."""
        self.__dict__["target"] = target
        self.submodel = submodel
        self.device = ""
        self.memory = where
        self.need = Need(estimated)
        self.taken = self.uses = self.loads = 0
        self.warned = False
        self.last_used = next(_ticks)
        self._budget = budget
        self._load = load
        self._engine: Engine | None = None
        self._computes = "float32"
        self._before = 0
        self._holding: WeakSet[Slot] = WeakSet()
        budget.add(self)

    @property
    def computes(self) -> str:
        return self._computes

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def idle(self) -> bool:
        """Whether it can be closed: no call runs and no slot has caches in it."""
        return not self.uses and not self._holding

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        with self._budget.lend(self, memory.size_of(inputs)) as engine:
            if slot is not None:
                self._holding.add(slot)
            return engine.run(inputs, slot)

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        with self._budget.lend(self, memory.size_of(inputs)) as engine:
            self._holding.add(slot)
            return engine.run_last(inputs, slot, count)

    def joins(self, inputs: Mapping[str, Array]) -> bool:
        return False  # more rows need more memory

    def run_many(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        with self._budget.lend(self, sum(memory.size_of(call.inputs) for call in calls)) as engine:
            self._holding.update(call.slot for call in calls if call.slot is not None)
            return engine.run_many(calls)

    def fork(self, slot: Slot, n: int) -> list[Slot]:
        if slot not in self._holding:
            return [Slot() for _ in range(n)]
        with self._budget.lend(self, 0) as engine:
            forks = engine.fork(slot, n)
            self._holding.update(forks)
            return forks

    def copy(self, slot: Slot, to: Slot) -> None:
        if slot in self._holding:
            with self._budget.lend(self, 0) as engine:
                engine.copy(slot, to)
                self._holding.add(to)

    def trim(self, slot: Slot, length: int) -> None:
        if slot in self._holding and self._engine is not None:
            self._engine.trim(slot, length)
        if length == 0:
            self._holding.discard(slot)

    def measure(self, visible: bool) -> None:
        """Load it, and measure its memory if that is `visible`, as part of this process."""
        with self._budget.lend(self, 0) as engine:
            if visible:
                self.need = memory.measure(engine, self._before, memory.of_process, self.need.base)
            self.taken = self.need.base

    def pick_up(self) -> Engine:
        """Load the engine if necessary. Only the budget calls this."""
        if self._engine is None:
            self._before, began = memory.of_process() or 0, time.perf_counter()
            self._engine = self._load()
            self.device, self.fallbacks, self._computes = (
                self._engine.device,
                self._engine.fallbacks,
                self._engine.computes,
            )
            self.decisions = self._engine.decisions
            self.reload_seconds += time.perf_counter() - began if self.loads else 0.0
            self.loads += 1
        return self._engine

    def put_down(self) -> None:
        """Close the engine if it is loaded. Only the budget calls this."""
        engine, self._engine, self.taken = self._engine, None, 0
        if engine is not None:
            engine.close()
            heap.give_back()

    def close(self) -> None:
        self._holding.clear()
        self._budget.remove(self)

    @classmethod
    def available(cls) -> Availability:
        return Availability(False, reason="it stands for an engine of another target")

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        raise NotImplementedError("it stands for an engine of another target")

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        raise NotImplementedError("it stands for an engine of another target")
