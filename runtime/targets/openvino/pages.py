"""KV caches in pages (Kwon et al. 2023, PagedAttention), for the paged attention of OpenVINO's CPU plugin, which is its
fastest.

The plugin takes a decoder's tokens [tokens, ...] without padding, one row after the other, and the place where each row
begins. Keys and values are tensors [pages, heads, positions of a page, size] that the caller owns, with a list of the
pages of each row. So rows of any slots and lengths are computed together, and slots share the pages of a common past.
Attention is causal by itself, and each layer's is limited to the given window.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy as np

from runtime.bundle.signature import Array, Port, Signature
from runtime.engine import divided
from runtime.optional import require

LAST: Final = "last_positions"
"""Indices of the last tokens of each row: outputs are given only of these."""
ATTENTION: Final = "PagedAttentionExtension"
KEYS: Final = 3
WINDOW: Final = 10
"""Indices of inputs of a paged attention: the cache of keys, and how many positions are seen (0 means all)."""
FIRST_CAPACITY: Final = 256
"""The least number of positions that pages are allocated for."""


def fits(signature: Signature) -> bool:
    """Whether the submodel is a decoder with the inputs that paged attention knows."""
    port = signature.port
    return port is not None and {tensor.name for tensor in signature.inputs} == {
        port.embeddings,
        port.mask,
        port.positions,
    }


def use_pages(model: Any, signature: Signature) -> None:
    """Change a model with states into one with pages. Raises RuntimeError when the SDK finds no attention it knows."""
    ops = require("openvino.opset15", "openvino")
    require("openvino._offline_transformations", "openvino").paged_attention_transformation(model)
    _unguard(model)
    _limit(model, ops, [state.window for state in signature.states[::2]])
    last = ops.parameter([-1], np.int32, name=LAST)
    last.output(0).get_tensor().set_names({LAST})
    model.add_parameters([last])
    for port in _into_the_end(model):
        source = port.get_source_output()
        taken = ops.gather(source, last, ops.constant(0)).output(0)
        port.replace_source_output(taken)
        if port.get_node().get_type_name() == "Result":
            taken.get_tensor().set_names(source.get_names())
    model.validate_nodes_and_infer_types()


def _into_the_end(model: Any) -> list[Any]:
    """The inputs by which values of all positions enter what follows the last attention. Nothing there mixes positions,
    so that it need be computed for those alone whose outputs are given.
    """
    nodes = model.get_ordered_ops()
    start = max(place for place, node in enumerate(nodes) if node.get_type_name() == ATTENTION)
    last, behind, entries = _name(nodes[start]), set[str](), list[Any]()
    for node in nodes[start + 1 :]:
        outside = [port for port in node.inputs() if _source(port) not in behind]
        if len(outside) < node.get_input_size() or last in map(_source, outside):
            behind.add(_name(node))
            entries += [port for port in outside if port.get_partial_shape().is_dynamic]
    return entries + [node.input(0) for node in model.get_results() if _name(node) not in behind]


def _name(node: Any) -> str:
    return str(node.get_name())  # unlike friendly names, no two nodes have the same


def _source(port: Any) -> str:
    return _name(port.get_source_output().get_node())


def _unguard(model: Any) -> None:
    """Remove what makes zeros of attention whose mask hides every position: in pages each row sees at least itself."""
    for node in model.get_ops():
        if node.get_type_name() != "Select":
            continue
        test, seen = node.input_value(0).get_node(), node.input_value(2)
        if test.get_type_name() == "IsNaN" and test.input_value(0) == seen:
            node.output(0).replace(seen)


def _limit(model: Any, ops: Any, windows: Sequence[int]) -> None:
    """Set the window of each layer's attention. The transformation removes masks, and numbers caches by layer."""
    nodes = [node for node in model.get_ops() if node.get_type_name() == ATTENTION]
    if len(nodes) != len(windows):
        raise RuntimeError(f"{len(nodes)} attentions over pages, expected {len(windows)}")
    for node in nodes:
        layer = int(node.input_value(KEYS).get_node().get_friendly_name().removeprefix("key_cache."))
        node.input(WINDOW).replace_source_output(ops.constant(windows[layer], np.int32).output(0))


def has_pages(compiled: Any) -> bool:
    """Whether a compiled model has pages."""
    return any(LAST in port.names for port in compiled.inputs)


class Table:
    """The pages of one slot: for each row those that hold its positions, in order. They are returned when the table is
    dropped.
    """

    def __init__(self, pages: Pages, rows: list[list[int]]) -> None:
        self.rows = rows
        weakref.finalize(self, pages.give_back, rows).atexit = False

    @property
    def batch(self) -> int:
        return len(self.rows)


class PagedCall(NamedTuple):
    """A call of the signature, the pages that it continues, and of how many last positions it gives outputs."""

    inputs: Mapping[str, Array]
    table: Table
    last: int = 1


class Write(NamedTuple):
    """A call's writes to one row: its pages, the number of positions before the call, and the number of new ones."""

    row: list[int]
    past: int
    new: int


class Pages:
    """An infer request, and the memory of the pages that all slots of an engine share.

    Any number of tables may hold a page; it is copied when one of them writes into it. The memory grows by doubling and
    shrinks when three quarters of it are unused.
    """

    def __init__(self, compiled: Any, port: Port) -> None:
        self.request, self.port = compiled.create_infer_request(), port
        caches = [port for port in compiled.inputs if port.any_name.startswith(("key_cache.", "value_cache."))]
        self._ports = {
            port.any_name: (port.element_type, [dim.get_length() for dim in list(port.partial_shape)[1:]])
            for port in caches
        }
        # Keys in 8 bits hold their scales as further positions, values do not.
        self.positions: int = self._ports["value_cache.0"][1][1]
        self.users: list[int] = []
        """How many tables hold each page."""
        self._memory: dict[str, Array] = {}
        self._tables: dict[int, list[list[int]]] = {}
        self._returned: deque[list[list[int]]] = deque()
        self._lock = Lock()

    def table(self, batch: int) -> Table:
        """An empty table of so many rows."""
        return self._table([[] for _ in range(batch)])

    def copied(self, table: Table) -> Table:
        """Another table of the same pages."""
        with self._lock:
            for page in itertools.chain(*table.rows):
                self.users[page] += 1
            return self._table([list(row) for row in table.rows])

    def run(self, calls: Sequence[PagedCall], outputs: Sequence[str]) -> list[dict[str, Array]]:
        """Run calls together; outputs [batch, last, ...] are those of the last positions of each row.

        Raises ValueError for a row with fewer positions than that, and for one that holds fewer positions than its mask
        says.
        """
        with self._lock:
            results = self.request.infer(self._feed(calls), share_inputs=True)
            positions = {name: np.array(results[name]) for name in outputs}
            self._collect()
        found = divided(positions, [call.table.batch * call.last for call in calls])
        return [
            {name: array.reshape(call.table.batch, call.last, *array.shape[2:]) for name, array in one.items()}
            for call, one in zip(calls, found, strict=True)
        ]

    def give_back(self, rows: list[list[int]]) -> None:
        """Return the pages of a dropped table: now, or at the end of the present run. May be called from any thread."""
        self._returned.append(rows)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _feed(self, calls: Sequence[PagedCall]) -> dict[str, Array]:
        """The inputs of the request for calls of the signature, without padding, wherever it is."""
        masks = [self._divided(call.inputs) for call in calls]
        lengths = np.concatenate([past.sum(1, dtype=np.int32) for past, _ in masks])
        counts = np.concatenate([new.sum(1, dtype=np.int32) for _, new in masks])
        if not counts.all():
            raise ValueError(f"{self.port.mask} has a row without any position of this call")
        lasts = np.repeat([call.last for call in calls], [call.table.batch for call in calls])
        short = lasts > counts
        if short.any():
            raise ValueError(f"outputs of {lasts[short][0]} positions were requested, a row has {counts[short][0]}")
        rows = [row for call in calls for row in call.table.rows]
        self._prepare([Write(*write) for write in zip(rows, lengths.tolist(), counts.tolist(), strict=True)])
        ends = counts.cumsum(dtype=np.int32)
        pairs = zip(ends.tolist(), lasts.tolist(), strict=True)
        tokens = {
            name: np.concatenate([call.inputs[name][new] for call, (_, new) in zip(calls, masks, strict=True)])
            for name in (self.port.embeddings, self.port.positions)
        }
        return tokens | {
            "past_lens": lengths,
            "subsequence_begins": _begins(ends),
            "block_indices": np.array([page for row in rows for page in row], np.int32),
            "block_indices_begins": _begins(np.cumsum([len(row) for row in rows], dtype=np.int32)),
            "max_context_len": np.array((lengths + counts).max(), np.int32),
            LAST: np.concatenate([np.arange(end - last, end) for end, last in pairs]).astype(np.int32),
        }

    def _prepare(self, writes: Sequence[Write]) -> None:
        """Give each row the pages that it needs, and pages of its own where it writes."""
        for row, past, _ in writes:
            if past > len(row) * self.positions:
                raise ValueError(
                    f"{self.port.mask} has {past} positions before this call, its slot holds "
                    f"{len(row) * self.positions} at most"
                )
        self._reserve(sum(self._missing(write) for write in writes))
        free = (page for page, users in enumerate(self.users) if not users)
        for write in writes:
            self._extend(write, free)

    def _missing(self, write: Write) -> int:
        """The greatest number of pages that the row may need."""
        first, needed = write.past // self.positions, self._needed(write)
        return needed - first - sum(self.users[page] == 1 for page in write.row[first:needed])

    def _needed(self, write: Write) -> int:
        return -(-(write.past + write.new) // self.positions)

    def _extend(self, write: Write, free: Iterator[int]) -> None:
        """Give the row pages of its own from where it writes, and drop those beyond its new length."""
        row, (first, within), needed = write.row, divmod(write.past, self.positions), self._needed(write)
        self._drop(row, needed)
        for index in range(first, needed):
            held = row[index] if index < len(row) else None
            if held is not None and self.users[held] == 1:
                continue
            page = next(free)
            self.users[page] = 1
            for memory in self._memory.values():  # what was never written must not be NaN: it is multiplied by 0
                memory[page] = memory[held] if held is not None and index == first and within else 0
            if held is not None:
                self.users[held] -= 1
            row[index : index + 1] = [page]

    def _drop(self, row: list[int], start: int) -> None:
        """Drop the pages of a row from the `start`th on."""
        for page in row[start:]:
            self.users[page] -= 1
        del row[start:]

    def _reserve(self, more: int) -> None:
        """Make sure that this many pages are free."""
        used = len(self.users) - self.users.count(0)
        if used + more > len(self.users):
            self._resize(max(FIRST_CAPACITY // self.positions, 1 << (used + more - 1).bit_length()))

    def _collect(self) -> None:
        """Free the pages of dropped tables, and memory where most of it is unused. The lock must be held."""
        while self._returned:
            rows = self._returned.popleft()
            del self._tables[id(rows)]
            for row in rows:
                self._drop(row, 0)
        used = len(self.users) - self.users.count(0)
        if not used:
            self.users, self._memory = [], {}
        elif used * 4 <= len(self.users) > FIRST_CAPACITY // self.positions:
            self._resize(max(FIRST_CAPACITY // self.positions, 1 << (used * 2 - 1).bit_length()))

    def _resize(self, count: int) -> None:
        """Allocate memory for this many pages, with those in use at its beginning."""
        sdk = require("openvino", "openvino")
        used = [page for page, users in enumerate(self.users) if users]
        for name, (kind, page) in self._ports.items():
            memory = np.zeros((count, int(np.prod(page)) * kind.bitwidth // 8), np.uint8)
            if used:
                memory[: len(used)] = self._memory[name][used]
            self._memory[name] = memory  # the tensor reads this memory but does not keep it
            self.request.set_tensor(name, sdk.Tensor(memory, sdk.Shape([count, *page]), kind))
        self.users = [self.users[page] for page in used] + [0] * (count - len(used))
        place = {page: index for index, page in enumerate(used)}
        for row in itertools.chain(*self._tables.values()):
            row[:] = [place[page] for page in row]

    def _divided(self, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        """Where there is no padding: bool [batch, past] before a call, and [batch, sequence] of it."""
        mask, sequence = inputs[self.port.mask] != 0, inputs[self.port.positions].shape[1]
        start = mask.shape[1] - sequence
        return mask[:, :start], mask[:, start:]

    def _table(self, rows: list[list[int]]) -> Table:
        self._tables[id(rows)] = rows
        return Table(self, rows)


def _begins(ends: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int32), ends])
