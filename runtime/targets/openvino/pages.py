"""KV caches in pages (Kwon et al. 2023, PagedAttention) for OpenVINO's CPU plugin, whose attention over pages is its
fastest.

The plugin takes a decoder's tokens [tokens, ...] without padding, row behind row, and where each row begins. Keys and
values are tensors [pages, heads, positions of a page, size] that the caller owns, and a list says which pages hold
which row. Attention is causal by itself, and each layer's is limited to the window that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from runtime.bundle.signature import Array, Signature
from runtime.optional import require

INPUTS: Final = {"inputs_embeds", "attention_mask", "position_ids"}
LAST: Final = "last_positions"
"""The last token of each row: only these are worth logits."""
KEYS: Final = 3
WINDOW: Final = 10
"""Inputs of an attention over pages, by place: the cache of keys, and how many positions are seen (0 is all)."""
FIRST_CAPACITY: Final = 256
"""Positions that the pages of a row hold at first."""


def fits(signature: Signature) -> bool:
    """Whether the submodel is a decoder whose calls can be put this way."""
    return bool(signature.states) and {tensor.name for tensor in signature.inputs} == INPUTS


def use_pages(model: Any, signature: Signature) -> None:
    """Change a model that keeps states into one that keeps pages. Raises RuntimeError when the SDK finds no attention
    it knows.
    """
    ops = require("openvino.opset15", "openvino")
    require("openvino._offline_transformations", "openvino").paged_attention_transformation(model)
    _limit(model, ops, [state.window for state in signature.states[::2]])
    product = model.output("logits").get_node().input_value(0).get_node()
    last = ops.parameter([-1], np.int32, name=LAST)
    last.output(0).get_tensor().set_names({LAST})
    model.add_parameters([last])
    product.input(0).replace_source_output(ops.gather(product.input_value(0), last, ops.constant(0)).output(0))
    model.validate_nodes_and_infer_types()


def _limit(model: Any, ops: Any, windows: Sequence[int]) -> None:
    """Give the attention of each layer its window. The transformation replaces masks by none, and numbers caches by
    layer.
    """
    nodes = [node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    if len(nodes) != len(windows):
        raise RuntimeError(f"{len(nodes)} attentions over pages, expected {len(windows)}")
    for node in nodes:
        layer = int(node.input_value(KEYS).get_node().get_friendly_name().removeprefix("key_cache."))
        node.input(WINDOW).replace_source_output(ops.constant(windows[layer], np.int32).output(0))


def has_pages(compiled: Any) -> bool:
    """Whether a compiled model keeps pages."""
    return any(LAST in port.names for port in compiled.inputs)


class Pages:
    """An infer request and the pages of its rows, which grow by doubling: row r has pages r * pages to (r +
    1) * pages.
    """

    def __init__(self, compiled: Any, batch: int) -> None:
        self.request = compiled.create_infer_request()
        self.batch = batch
        self.pages = 0
        caches = [port for port in compiled.inputs if port.any_name.startswith(("key_cache.", "value_cache."))]
        self._ports = {
            port.any_name: (port.element_type, [dim.get_length() for dim in list(port.partial_shape)[1:]])
            for port in caches
        }
        self._held: dict[str, Any] = {}

    def feed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What the request takes for a call of the signature: inputs_embeds [batch, sequence, hidden], attention_mask
        [batch, total], position_ids [batch, sequence]. Padding is left out wherever it is. Raises ValueError for a row
        of nothing else.
        """
        mask, (batch, sequence) = inputs["attention_mask"] != 0, inputs["position_ids"].shape
        past, new = mask[:, : mask.shape[1] - sequence], mask[:, mask.shape[1] - sequence :]
        lengths, counts = past.sum(1, dtype=np.int32), new.sum(1, dtype=np.int32)
        if not counts.all():
            raise ValueError("attention_mask has a row without any position of this call")
        context = int((lengths + counts).max())
        self._reserve(context)
        ends = counts.cumsum(dtype=np.int32)
        return {
            "inputs_embeds": inputs["inputs_embeds"][new],
            "position_ids": inputs["position_ids"][new],
            "past_lens": lengths,
            "subsequence_begins": np.concatenate([np.zeros(1, np.int32), ends]),
            "block_indices": np.arange(batch * self.pages, dtype=np.int32),
            "block_indices_begins": np.arange(batch + 1, dtype=np.int32) * np.int32(self.pages),
            "max_context_len": np.array(context, np.int32),
            LAST: ends - 1,
        }

    def _reserve(self, length: int) -> None:
        """Have pages for so many positions of every row, with what they held before."""
        _, (_, positions, _) = self._ports[
            "value_cache.0"
        ]  # those of keys in 8 bits hold their scales as further positions
        if length <= self.pages * positions:
            return
        sdk = require("openvino", "openvino")
        before, self.pages = self.pages, -(-max(FIRST_CAPACITY, 1 << (length - 1).bit_length()) // positions)
        for name, (kind, page) in self._ports.items():
            nbytes = int(np.prod(page)) * kind.bitwidth // 8
            grown = np.zeros(
                (self.batch, self.pages, nbytes), np.uint8
            )  # what was never written must not be NaN: it is multiplied by 0
            if before:
                grown[:, :before] = self._held[name]
            self._held[name] = grown  # the tensor reads this memory but does not keep it
            self.request.set_tensor(name, sdk.Tensor(grown, sdk.Shape([self.batch * self.pages, *page]), kind))
