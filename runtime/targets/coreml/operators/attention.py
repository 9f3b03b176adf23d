"""Attention, and the caches that its keys and values are written into."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from runtime.targets.coreml.operators.base import attribute, given, kept, like, operator, placed, refuse, reshaped

if TYPE_CHECKING:
    import onnx_ir as ir


@operator("Attention")
def _attention(t: Any, node: ir.Node) -> Any:
    """Heads that share keys and values are moved into the sequence axis, so that keys and values are not repeated."""
    if given(node, 4) is not None or any(output.uses() for output in node.outputs[1:]):
        raise refuse(node, "keeps its past itself")
    if attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        raise refuse(node, "is causal by itself or caps its scores")
    query, key, value = (t.var(found) for found in node.inputs[:3])
    mask = None if given(node, 3) is None else t.var(node.inputs[3])
    if query.rank != 4:
        raise refuse(node, "has heads packed into one axis")
    heads, size, shared = int(query.shape[1]), int(query.shape[3]), int(key.shape[1])
    wanted = attribute(node, "scale", size**-0.5) * math.sqrt(size)
    if abs(wanted - 1) > 1e-6:
        query = t.mb.mul(x=query, y=like(t, query, wanted))
    if heads != shared:
        query = reshaped(t, query, [kept(t, query, 0), shared, -1, size])
        if mask is not None and mask.rank >= 2:
            if mask.rank > 2 and mask.shape[-3] != 1:
                raise refuse(node, "has a mask for each head")
            mask = t.mb.tile(x=mask, reps=[1] * (mask.rank - 2) + [heads // shared, 1])
    inputs = {"query": query, "key": key, "value": value} | ({} if mask is None else {"attn_mask": mask})
    result = t.mb.scaled_dot_product_attention(**inputs)
    return result if heads == shared else reshaped(t, result, [kept(t, query, 0), heads, -1, int(value.shape[3])])


@operator("TensorScatter")
def _tensor_scatter(t: Any, node: ir.Node) -> Any:
    """Write new keys or values into a state in place, and read it."""
    state = t.states.get(node.inputs[0])
    if state is None:
        raise refuse(node, "writes into what is no state")
    axis = attribute(node, "axis", -2)
    new, start = t.var(node.inputs[1]), t.var(node.inputs[2])
    rank = new.rank
    axis %= rank
    cache = t.mb.read_state(input=state)
    count = t.mb.slice_by_index(x=t.mb.shape(x=new), begin=[axis], end=[axis + 1])
    others = [index != axis for index in range(rank)]
    begin = placed(t, node, [0] * rank, [axis], start)
    end = placed(t, node, [0] * rank, [axis], t.mb.add(x=start, y=count))
    update = new if new.dtype == cache.dtype else t.mb.cast(x=new, dtype="fp16")
    whole = t.mb.slice_update(x=cache, update=update, begin=begin, end=end, begin_mask=others, end_mask=others)
    kept = t.mb.coreml_update_state(state=state, value=whole)
    t.updated.add(node.outputs[0])
    return kept if kept.dtype == new.dtype else t.mb.cast(x=kept, dtype=t.mb.types.builtin_to_string(new.dtype))
