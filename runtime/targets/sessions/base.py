"""The base of ONNX Runtime's targets: a session for the lengths of a call, inputs and outputs bound to memory, and
caches in buffers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array
from runtime.engine import Compiled, Engine, Options, Slot, SlotCall, divided, require_distinct, run_alone
from runtime.errors import EngineError
from runtime.targets.lowering.logits import START
from runtime.targets.lowering.nested import WEIGHTS
from runtime.targets.lowering.static_cache import INDICES
from runtime.targets.sessions.caches import Cache, Rows, bind, covered, joined
from runtime.targets.sessions.sessions import (
    CPU,
    NO_FALLBACK,
    RECORD,
    SHAPE_OPERATORS,
    Device,
    elsewhere,
    listed,
    nested_values,
    open_session,
    sdk,
    values_of,
)
from runtime.targets.sessions.shapes import Shape, cuts, fitting
from runtime.targets.sessions.stored import SessionPlan, read_plan

KEPT: Final = 2
"""Sessions that are kept for shapes outside of the plan: each may hold weights of its own on the device."""
Key = tuple[tuple[str, int], ...]
Open = Callable[[Shape, bool], Any]
"""Opens a session with these lengths fixed; of the graph for single steps, or of the other."""


class SessionEngine(Engine):
    """A submodel in sessions of one device. `plan` says how it was lowered, `open_session` opens a session of it.

    There is one session for each shape that it is called with: those of the plan that fix all lengths are opened at
    once, others when they first occur. With `vary` there is one session for all shapes. `replay` records calls of a
    shape and repeats them (CUDA graphs). `fallback` says which nodes may run on the CPU: "any", or "shapes" for those
    that compute lengths; the engine's `device` says which do.
    """

    def __init__(
        self,
        submodel: Submodel,
        name: str,
        device: Device,
        plan: SessionPlan,
        open_session: Open,
        *,
        vary: bool = False,
        replay: bool = False,
        fallback: str = "shapes",
    ) -> None:
        self.submodel, self.plan, self.device = submodel, plan, name
        self._name, self._fallback, self._left = name, fallback, Counter[str]()
        self._device, self._open, self._vary, self._replay = device, open_session, vary, replay
        self._outputs = [tensor.name for tensor in submodel.signature.outputs]
        self._sessions: OrderedDict[Key, Any] = OrderedDict()
        self._calls: OrderedDict[Any, _Call] = OrderedDict()
        self._inputs: WeakKeyDictionary[Any, Mapping[str, str]] = WeakKeyDictionary()
        self._slots: WeakKeyDictionary[Slot, Rows] = WeakKeyDictionary()
        self._spare: dict[int, dict[str, Any]] = {}
        self._closed = False
        port = submodel.signature.port
        grown = {port.past, port.total} if port is not None and plan.cache == "fixed" else set()
        dims = submodel.signature.dims.keys() - grown
        self._planned = [_key(shape) for shape in ([{}] if vary else plan.shapes) if vary or set(shape) == dims]
        for key in self._planned:
            self._session(dict(key))

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        self._require_open()
        try:
            if self.submodel.signature.states:
                return self._run_slots([(inputs, slot or Slot())])[0]
            return self._run(self._session(self.submodel.signature.lengths(inputs)), inputs, {}, {})
        except Exception as error:  # the SDK raises a dozen unrelated classes
            raise self._failed(error) from None

    def run_many(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        """Run single steps of several slots in one call on the rows of one buffer, where GroupQueryAttention continues
        each row at its own length and a session takes any number of rows; run the others one after another.
        """
        self._require_open()
        if not self._vary or self.plan.cache != "grouped":
            return super().run_many(calls)
        require_distinct(calls)
        steps = [index for index, call in enumerate(calls) if call.slot and self._joins(call.inputs, call.slot)]
        joined = [(calls[index].inputs, calls[index].slot or Slot()) for index in steps]
        if len(steps) < 2 or not self._alike([inputs for inputs, _ in joined]):
            return super().run_many(calls)
        try:
            together = self._run_slots(joined)
        except Exception as error:  # the SDK raises a dozen unrelated classes
            raise self._failed(error) from None
        found = dict(zip(steps, together, strict=True))
        return [found[index] if index in found else run_alone(self, call) for index, call in enumerate(calls)]

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        """One run where the lowered graph has an input for it. Graphs of fixed shapes (DirectML) and those of older
        bundles have none.
        """
        self._require_open()
        if not self._vary or START not in self._types(self._session({})):
            return super().run_last(inputs, slot, count)
        self.require_positions(inputs, count)
        try:
            return self._run_slots([(inputs, slot)], count)[0]
        except Exception as error:  # the SDK raises a dozen unrelated classes
            raise self._failed(error) from None

    def fork(self, slot: Slot, n: int) -> list[Slot]:
        """New slots that hold rows of one buffer, so that they can be run together without copies."""
        rows = self._slots.get(slot)
        forks = [Slot() for _ in range(n)]
        if rows is not None and forks:
            self._give(forks, [rows] * n)
        return forks

    def copy(self, slot: Slot, to: Slot) -> None:
        rows = self._slots.get(slot)
        if rows is not None:
            self._give([to], [rows])

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.submodel.name} was closed: load it again")

    def _failed(self, reason: object) -> EngineError:
        return EngineError(f"ONNX Runtime could not run {self.submodel.name}: {reason}")

    def _alike(self, calls: Sequence[Mapping[str, Array]]) -> bool:
        """Whether calls differ in nothing but rows and positions: the keys of an encoder may be of other lengths."""
        signature = self.submodel.signature
        varying = dict.fromkeys((signature.decoder.batch, signature.decoder.total), 0)
        lengths = [signature.lengths(inputs) | varying for inputs in calls]
        return all(one == lengths[0] for one in lengths)

    def _joins(self, inputs: Mapping[str, Array], slot: Slot) -> bool:
        """Whether the call is a single step that can be computed with those of other slots."""
        rows, shape = self._slots.get(slot), inputs[self.submodel.signature.decoder.positions].shape
        return rows is not None and shape == (rows.batch, 1)

    def _session(self, lengths: Mapping[str, int]) -> Any:
        """The session for a call of these lengths, opened if there is none yet. Raises EngineError when the submodel
        was compiled for others.
        """
        if not self._vary and self.plan.shapes:
            fitting(self.plan.shapes, lengths)
        key = () if self._vary else _key(lengths)
        if key not in self._sessions:
            others = [known for known in self._sessions if known not in self._planned]
            if key not in self._planned and len(others) >= KEPT:
                gone = self._sessions.pop(others[0])
                self._calls = OrderedDict((one, call) for one, call in self._calls.items() if call.session is not gone)
            self._sessions[key] = self._inspected(self._open(dict(key), self._steps(lengths)))
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _inspected(self, session: Any) -> Any:
        """The session, if its provider runs all nodes that it must. Raises EngineError naming those that would run on
        the CPU.
        """
        if self._device.provider == CPU:
            return session
        if self._device.provider not in session.get_providers():  # a warning is all that ONNX Runtime itself has for it
            raise EngineError(
                f"ONNX Runtime could not start {self._device.provider}, and would run all on the CPU: see its message "
                "above"
            )
        nodes = elsewhere(session, self._device.provider)
        if self._fallback != "any" and set(nodes) - SHAPE_OPERATORS:
            raise EngineError(
                f"ONNX Runtime would run {listed(nodes)} on the CPU: load it with the setting fallback=any to let it"
            )
        self._left |= nodes
        if self._left:
            self.device = f"{self._name} with {listed(self._left)} on the CPU"
        return session

    def _steps(self, lengths: Mapping[str, int]) -> bool:
        """Whether calls of these lengths are single steps, and those have a graph of their own."""
        return bool(self.plan.step) and lengths[self.submodel.signature.decoder.sequence] == 1

    def _types(self, session: Any) -> Mapping[str, str]:
        """ONNX Runtime's type of each input of a session."""
        if session not in self._inputs:
            self._inputs[session] = {value.name: value.type for value in session.get_inputs()}
        return self._inputs[session]

    def _run(
        self,
        session: Any,
        inputs: Mapping[str, Array],
        past: Mapping[str, Any],
        present: Mapping[str, Any],
        last: int = 1,
    ) -> dict[str, Array]:
        """Run once, reading states from `past` and writing them to `present`, by the name of the past. A decoder gives
        the logits of its `last` positions.
        """
        if self._replay and not past:
            return self._call(session, inputs).run(inputs)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        if START in self._types(session):
            binding.bind_cpu_input(START, np.array([-last], np.int64))
        for name in self._outputs:
            binding.bind_output(name)
        for state in self.submodel.signature.states:
            bind(binding, "input", state.past.name, past[state.past.name], self._device)
            bind(binding, "output", state.present.name, present[state.past.name], self._device)
        session.run_with_iobinding(binding)
        results = binding.get_outputs()  # in the order they were bound
        # A view of a value dies with the value, so the caller gets copies.
        return {name: np.array(value.numpy()) for name, value in zip(self._outputs, results, strict=False)}

    def _call(self, session: Any, inputs: Mapping[str, Array]) -> _Call:
        """The recorded call of these shapes. Two are kept."""
        key = (id(session), tuple((name, array.shape) for name, array in inputs.items()))
        if key not in self._calls:
            if len(self._calls) >= KEPT:
                self._calls.popitem(last=False)
            self._calls[key] = _Call(session, self._device, self._outputs)
        self._calls.move_to_end(key)
        return self._calls[key]

    def _run_slots(self, calls: Sequence[tuple[Mapping[str, Array], Slot]], last: int = 1) -> list[dict[str, Array]]:
        """Run calls of the same number of new positions together; the logits are those of the `last` of them."""
        mask = self.submodel.signature.decoder.mask
        counts = [len(inputs[mask]) for inputs, _ in calls]
        for (_, slot), count in zip(calls, counts, strict=True):
            held = self._slots.get(slot)
            if held is not None and held.batch != count:
                raise EngineError(f"the slot holds {held.batch} rows, this call has {count}")
        if self.plan.cache == "grouped" and not all(inputs[mask].all() for inputs, _ in calls):
            raise EngineError(f"{mask} has zeros, expected rows without padding")
        inputs = self._stacked([inputs for inputs, _ in calls])
        run = self._run_grouped if self.plan.cache == "grouped" else self._run_fixed
        outputs = run(inputs, [slot for _, slot in calls], last)
        return divided(outputs, counts)

    def _stacked(self, calls: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """The rows of several calls stacked into one call. Masks are padded with zeros at the end."""
        if len(calls) == 1:
            return dict(calls[0])
        mask = self.submodel.signature.decoder.mask
        total = max(inputs[mask].shape[1] for inputs in calls)
        padded = [
            {**inputs, mask: np.pad(inputs[mask], ((0, 0), (0, total - inputs[mask].shape[1])))} for inputs in calls
        ]
        return {
            tensor.name: np.concatenate([inputs[tensor.name] for inputs in padded])
            for tensor in self.submodel.signature.inputs
        }

    def _cache(self, slots: Sequence[Slot], batch: int, session: Any) -> Cache:
        """The cache whose rows are those of the slots, in order; made of copies where there is none. New buffers have
        the types of the session's inputs.
        """
        held = [self._slots[slot] for slot in slots if slot in self._slots]
        if not held:
            types = self._types(session)
            longest = self.plan.capacity or self.submodel.signature.longest
            made = Cache(self.submodel.signature, batch, self._device, types, longest)
            self._slots[slots[0]] = Rows(made, 0, batch)
            return made
        return covered(held) or self._give(slots, held)

    def _give(self, slots: Sequence[Slot], rows: Sequence[Rows]) -> Cache:
        """Give each slot a copy of these rows, in one new cache. Where rows of an old cache are left without a slot,
        its other slots move to a smaller one.
        """
        cache, first = joined(rows), 0
        for slot, part in zip(slots, rows, strict=True):
            self._slots[slot] = Rows(cache, first, part.batch)
            first += part.batch
        for old in {id(part.cache): part.cache for part in rows}.values():
            left = {slot: held for slot, held in self._slots.items() if held.cache is old}
            if left and sum(held.batch for held in left.values()) < old.batch:
                self._give(list(left), list(left.values()))
        return cache

    def _run_grouped(self, inputs: Mapping[str, Array], slots: Sequence[Slot], last: int) -> dict[str, Array]:
        """Past and present are one buffer. The kernel continues several rows only one position at a time, each behind
        its own number of positions, and reads no padding.
        """
        signature = self.submodel.signature
        lengths, port = signature.lengths(inputs), signature.decoder
        batch, sequence, total = lengths[port.batch], lengths[port.sequence], lengths[port.total]
        session = self._session(lengths)
        buffers = self._cache(slots, batch, session).reserve(total)
        if batch == 1 or sequence in (1, total):
            return self._run(session, inputs, buffers, buffers, last)
        steps = deque[dict[str, Array]](maxlen=last)
        for position in range(sequence):
            steps.append(self._run(session, signature.cut(inputs, position, position + 1), buffers, buffers))
        return signature.joined(steps)

    def _run_fixed(self, inputs: Mapping[str, Array], slots: Sequence[Slot], last: int) -> dict[str, Array]:
        """Past and present are two buffers of the whole length, which are swapped after each run; the one not in use is
        shared by all slots of as many rows.
        """
        lengths, port = self.submodel.signature.lengths(inputs), self.submodel.signature.decoder
        batch, sequence, total = lengths[port.batch], lengths[port.sequence], lengths[port.total]
        if total > self.plan.capacity:
            raise EngineError(
                f"{total} positions do not fit its cache of {self.plan.capacity}: say less, or build it with a larger "
                "context"
            )
        outputs: dict[str, Array] = {}
        for start, stop in cuts(sequence, self._sizes(lengths)):
            piece, end = {port.batch: batch, port.sequence: stop - start}, total - sequence + stop
            session = self._session(piece)
            cache = self._cache(slots, batch, session)
            past = cache.whole()
            given = self.submodel.signature.cut(inputs, start, stop) | {
                INDICES: np.full(batch, end - (stop - start), np.int64)
            }
            given[port.mask] = np.zeros((batch, self.plan.capacity), np.int64)
            given[port.mask][:, :end] = inputs[port.mask][:, :end]
            given = {name: array for name, array in given.items() if name in self._types(session)}
            if self._steps(piece):
                if not inputs[port.mask].all():
                    raise EngineError(
                        f"{port.mask} has zeros, expected rows without padding: or build it with the setting "
                        "grouped=false"
                    )
                outputs = self._run(session, given, past, past)
            else:
                spare = self._spare.pop(batch, None) or cache.like()
                outputs = self._run(session, given, past, spare, last)
                self._spare, cache.values = {batch: past}, spare
        return outputs

    def _sizes(self, lengths: Mapping[str, int]) -> list[int]:
        """The numbers of new positions that there are sessions for, at the other lengths of a call; the call's own
        where any is possible.
        """
        sequence = self.submodel.signature.decoder.sequence
        fits = [
            shape
            for shape in self.plan.shapes
            if all(name == sequence or lengths[name] == shape[name] for name in shape)
        ]
        return sorted({shape[sequence] for shape in fits if sequence in shape}) or [lengths[sequence]]

    def close(self) -> None:
        self._slots.clear()
        self._spare.clear()
        self._calls.clear()
        self._sessions.clear()
        self._closed = True


class _Call:
    """Inputs and outputs of one shape at fixed addresses, so that the work between them can be recorded and
    replayed.
    """

    graphs = 0

    def __init__(self, session: Any, device: Device, outputs: list[str]) -> None:
        self.session, self.device, self.names = session, device, outputs
        self.inputs: dict[str, Any] = {}
        self.binding = session.io_binding()
        self.options = sdk().RunOptions()
        _Call.graphs += 1
        self.options.add_run_config_entry("gpu_graph_id", str(_Call.graphs))
        self.results: list[Any] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self.inputs:
            for name, array in inputs.items():
                self.inputs[name].update_inplace(np.ascontiguousarray(array))
        else:
            self._bind(inputs)
        self.session.run_with_iobinding(self.binding, self.options)
        self.results = self.results or self.binding.get_outputs()
        return {name: np.array(value.numpy()) for name, value in zip(self.names, self.results, strict=True)}

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        """Put inputs on the device. Outputs get their shapes from a first run that is not recorded."""
        make = sdk().OrtValue.ortvalue_from_numpy
        for name, array in inputs.items():
            self.inputs[name] = make(np.array(array, order="C"), self.device.memory, self.device.index)
            self.binding.bind_ortvalue_input(name, self.inputs[name])
        for name in self.names:
            self.binding.bind_output(name, self.device.memory, self.device.index)
        first = sdk().RunOptions()
        first.add_run_config_entry("gpu_graph_id", "-1")
        self.session.run_with_iobinding(self.binding, first)
        self.results = self.binding.get_outputs()
        for name, value in zip(self.names, self.results, strict=True):
            self.binding.bind_ortvalue_output(name, value)


def _key(shape: Shape) -> Key:
    return tuple(sorted(shape.items()))


def stored(
    submodel: Submodel,
    root: Path,
    target: str,
    device: Device,
    options: Options,
    *,
    entries: Mapping[str, str],
    fallback: str,
) -> tuple[SessionPlan, Open]:
    """The stored plan of a submodel of the bundle at `root`, and a function that opens sessions of it. Raises
    EngineError.

    On the CPU nothing is fused that the graph does not fuse: it would round differently from other devices.
    """
    folder, canonical = folder_of(root, target, options.compiled), (root / submodel.graph).parent
    plan = read_plan(folder, submodel.name)
    converted = (values_of(folder / plan.weights) if plan.weights else {}) | nested_values(plan, canonical / WEIGHTS)
    chosen = {RECORD: "1"} | dict(entries) | ({NO_FALLBACK: "1"} if fallback == "none" else {})

    def opened(shape: Shape, step: bool) -> Any:
        options.verify()
        graph = folder / (plan.step if step else plan.graph)
        level = "ORT_ENABLE_BASIC" if device.provider == CPU else "ORT_ENABLE_ALL"
        return open_session(
            graph,
            canonical,
            device,
            threads=options.threads,
            entries=chosen,
            fixed=shape,
            converted=converted,
            level=level,
        )

    return plan, opened


def folder_of(root: Path, target: str, compiled: Compiled | None) -> Path:
    """The folder of the stored files: the one that `runtime.placing.portable` found, else the bundle's."""
    return compiled.folder if compiled else root / "engines" / target
