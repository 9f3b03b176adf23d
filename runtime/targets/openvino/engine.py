"""OpenVINO reads the canonical graph directly. KV caches become pages (on the CPU) or states of the model, updated in
place.

Nothing is stored at build time, and on the device only where the user says so (`runtime.targets.openvino.blobs`):
OpenVINO maps the graph and its weights in about a second and compiles for the
processor it finds, so a bundle never carries an engine that does not fit. Compiling at build time proves that the graph
is accepted, and measures it.

Numbers have the precision that the bundle states, not the plugin's default on this processor (bfloat16, a cache of 8
bits, inputs rounded to 8 bits). `Options.settings` may override that: `KV_CACHE_PRECISION` "u8" makes the cache a
quarter as large.

On the CPU, graphs with quantized activations are compiled for each shape they are called with: at dynamic shapes the
plugin of 2026.4 computes int8 convolutions of Stable Diffusion wrongly (3 dB). See
docs/decisions/0011-int8-at-fixed-shapes.md. A denoiser is also compiled for classifier-free guidance batches, whose
rows share their first layers (`runtime.targets.openvino.sharing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot, SlotCall, require_distinct
from runtime.errors import EngineError, MissingDependency
from runtime.optional import require
from runtime.targets.openvino.compiling import Made, compiled_for
from runtime.targets.openvino.deciding import decisions_for
from runtime.targets.openvino.fixed import Fixed, Shapes, is_least, looks_up, usual, varies
from runtime.targets.openvino.graph import (
    BEAMS,
    StoredGraph,
)
from runtime.targets.openvino.pages import PagedCall, Pages, Table, has_pages
from runtime.targets.openvino.settings import CHOICES, TARGET, shared_core, where_of
from runtime.targets.openvino.sharing import guided

SHAPES: Final = 2
"""Shapes that a submodel is kept compiled for where each needs its own; the least recently used one is dropped first.
"""


class OpenVINO(Engine):
    """A compiled model. Stateless calls use one infer request, or one for each shape. Slots share pages and one
    request, or have one each.
    """

    target = TARGET
    packages = ("openvino",)
    rank = 20
    precisions = Engine.precisions | {"nf4"}
    choices = CHOICES

    def __init__(
        self,
        submodel: Submodel,
        graph: StoredGraph,
        made: Made,
        fix: Callable[[Fixed], Any] | None = None,
        every: bool = False,
    ) -> None:
        self.submodel = submodel
        self.device = made.device
        self.fallbacks = made.fallbacks
        self.decisions = made.decisions
        self._compiled = made.compiled
        self._request = made.compiled.create_infer_request()
        self._computes = made.computes
        self._fix, self._every = fix, every
        self._graph = graph  # what is compiled reads from its weights
        self._fixed: dict[Fixed, Any] = {}
        if every:
            self._fixed[usual(submodel)] = self._request
        self._pages = Pages(made.compiled, submodel.signature.decoder) if has_pages(made.compiled) else None
        self._slots: WeakKeyDictionary[Slot, _Held | Table] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        try:
            sdk, core = require("openvino", "openvino"), shared_core()
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        names = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
        return Availability(
            bool(names),
            tuple(f"{name} ({full})" for name, full in names.items()),
            "" if names else "no device",
            sdk.__version__,
        )

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        cls.check_settings(options.settings)
        compiled_for(submodel, StoredGraph(graph), Options())
        return Artifact(target=cls.target, submodel=submodel.name, seconds=time.perf_counter() - start)

    @classmethod
    def decide(cls, submodel: Submodel, root: Path, options: Options) -> None:
        decisions_for(shared_core(), submodel, StoredGraph(root / submodel.graph), where_of(options), options)

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        graph = StoredGraph(root / submodel.graph)
        made = compiled_for(submodel, graph, options)
        if submodel.signature.states or not varies(submodel):
            return cls(submodel, graph, made)
        if not made.fixed and looks_up(made.compiled):  # right at any shape, and a fixed one takes seconds to compile
            return cls(submodel, graph, made)

        def fix(fixed: Fixed) -> Any:
            options.verify()
            return compiled_for(submodel, graph, options, fixed, made.decisions).compiled

        return cls(submodel, graph, made, fix, made.fixed)

    @property
    def computes(self) -> str:
        return self._computes

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        if self._pages is not None:
            return self._run_paged([SlotCall(inputs, slot)])[0]
        request, feed = self._request, dict(inputs)
        try:
            shapes = {name: array.shape for name, array in inputs.items()}
            if self._fix is not None and self._compiles(shapes):
                request = self._for(
                    self._fix, Fixed.of(shapes, self._every and guided(self.submodel.signature, inputs))
                )
            elif self.submodel.signature.states:
                batch = len(next(iter(inputs.values())))
                request = self._held(slot or Slot(), batch).request
                feed |= {BEAMS: np.arange(batch, dtype=np.int32)}
            results = request.infer(feed, share_inputs=True)
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None
        return {tensor.name: np.array(results[tensor.name]) for tensor in self.submodel.signature.outputs}

    def joins(self, inputs: Mapping[str, Array]) -> bool:
        return self._fix is None or not self._compiles({name: array.shape for name, array in inputs.items()})

    def _compiles(self, shapes: Shapes) -> bool:
        """Whether calls of these shapes are compiled by themselves."""
        return self._every or is_least(self.submodel.signature, shapes)

    def run_many(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        """One infer request for all rows of all calls where the cache is in pages, else one call after another."""
        return super().run_many(calls) if self._pages is None else self._run_paged(calls)

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        if self._pages is None:
            return super().run_last(inputs, slot, count)
        self.require_positions(inputs, count)
        return self._run_paged([SlotCall(inputs, slot, count)])[0]

    def _run_paged(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        assert self._pages is not None
        require_distinct(calls)
        positions = self.submodel.signature.decoder.positions
        paged = [
            PagedCall(inputs, self._table(slot or Slot(), len(inputs[positions])), last) for inputs, slot, last in calls
        ]
        try:
            return self._pages.run(paged, [tensor.name for tensor in self.submodel.signature.outputs])
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None

    def copy(self, slot: Slot, to: Slot) -> None:
        held = self._slots.get(slot)
        if isinstance(held, Table):
            assert self._pages is not None
            self._slots[to] = self._pages.copied(held)
        elif held is not None:
            self._slots[to] = held.copied(self._compiled)

    def trim(self, slot: Slot, length: int) -> None:
        super().trim(slot, length)
        held = self._slots.get(slot)
        if not isinstance(held, _Held):
            return
        sdk = require("openvino", "openvino")
        for state in held.request.query_state():
            kept = np.ascontiguousarray(state.state.data[:, :, :length])
            state.state = sdk.Tensor(kept)

    def close(self) -> None:
        self._slots.clear()
        self._fixed.clear()
        self._request = self._compiled = self._pages = None

    def _for(self, fix: Callable[[Fixed], Any], fixed: Fixed) -> Any:
        """The request of the model that is compiled for this; compiled now if there is none."""
        request = self._fixed.pop(fixed, None)
        if request is None:
            while len(self._fixed) >= SHAPES:
                del self._fixed[next(iter(self._fixed))]
            if self._every:
                self._request = self._compiled = None  # the usual shape's is held by the table alone
            request = fix(fixed).create_infer_request()
        self._fixed[fixed] = request
        return request

    def _table(self, slot: Slot, batch: int) -> Table:
        assert self._pages is not None
        held = self._slots.get(slot)
        if not isinstance(held, Table):
            self._slots[slot] = held = self._pages.table(batch)
        self._require_rows(held.batch, batch)
        return held

    def _held(self, slot: Slot, batch: int) -> _Held:
        held = self._slots.get(slot)
        if not isinstance(held, _Held):
            self._slots[slot] = held = _Held(self._compiled.create_infer_request(), batch)
        self._require_rows(held.batch, batch)
        return held

    def _require_rows(self, held: int, batch: int) -> None:
        """Raise EngineError for a call with other rows than its slot: the plugin would read beyond the slot's
        states.
        """
        if held != batch:
            raise self._failed(f"the slot holds {held} rows, this call has {batch}")

    def _failed(self, reason: object) -> EngineError:
        return EngineError(f"OpenVINO could not run {self.submodel.name}: {reason}")


class _Held(NamedTuple):
    """The states of a slot without pages: an infer request, and the number of its rows."""

    request: Any
    batch: int

    def copied(self, compiled: Any) -> _Held:
        sdk, request = require("openvino", "openvino"), compiled.create_infer_request()
        held = {state.name: state.state.data for state in self.request.query_state()}
        for state in request.query_state():
            state.state = sdk.Tensor(np.array(held[state.name]))
        return _Held(request, self.batch)
