"""Which attentions may compute in bfloat16 beside int8 layers: measured on captured inputs, one by one.

Attention's own products have no weights and stay what they are when layers are quantized: of Stable Diffusion 1.5's
int8 UNet they are 40 % of the time on a processor. bfloat16 has the range of float32 and rounds queries and keys to
2^-9; a softmax turns that into noise where scores are large, which is what is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from calibration.ground.progress import each
from calibration.observe.lean import lean_session, rows_of
from calibration.quantize.equalize import decibel
from calibration.quantize.layers import name_of
from runtime.bundle.signature import Array

CALLS: Final = 2
"""Captured calls that it is measured on, evenly spread."""
PAST: Final = 4
"""Attention's inputs from this one on are states: those of decoders stay in the type that their caches have."""
OPERANDS: Final = 3
"""Queries, keys and values."""


def attention_in_half(model: ir.Model, samples: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The signal to noise ratio, in dB, of each attention of a float graph when its operands are rounded to bfloat16;
    the worst call's.

    Attention over a cache is left out. The graph runs once for each of a few calls, every attention twice.
    """
    copy = model.clone()
    nodes = [
        node for node in copy.graph if (node.domain, node.op_type) == ("", "Attention") and not any(node.inputs[PAST:])
    ]
    if not nodes or not samples:
        return {}
    copy.graph.outputs.clear()
    outputs = {name_of(node): [str(value.name) for value in _noise_and_power(copy, node)] for node in nodes}
    session: Any = lean_session(copy)
    wanted = [name for names in outputs.values() for name in names]
    found = dict.fromkeys(outputs, np.inf)
    for index in each(
        "attention, call", np.linspace(0, len(samples) - 1, min(CALLS, len(samples))).astype(int).tolist()
    ):
        totals = np.zeros(len(wanted))
        for row in rows_of(samples[index], session):
            totals += np.array(session.run(wanted, row), np.float64)
        for name, (noise, power) in zip(outputs, totals.reshape(-1, 2), strict=True):
            ratio = decibel(float(noise / power)) if power > 0 else np.inf
            found[name] = min(found[name], ratio if np.isfinite(noise + power) else -np.inf)
    return found


def _noise_and_power(model: ir.Model, node: ir.Node) -> list[ir.Value]:
    """Outputs of the graph: the squared difference between an attention and itself on rounded operands, and its square,
    summed.
    """
    made: list[ir.Node] = []

    def add(
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        one = ir.node(op, inputs, attributes, name=f"{node.name}/half/{len(made)}")
        made.append(one)
        value = one.outputs[0]
        value.name, value.dtype = f"{one.name}:0", dtype
        return value

    rounded = []
    for value in node.inputs[:OPERANDS]:
        half = add("Cast", [value], {"to": ir.DataType.BFLOAT16}, ir.DataType.BFLOAT16)
        rounded.append(add("Cast", [half], {"to": ir.DataType.FLOAT}))
    twin = add("Attention", [*rounded, *node.inputs[OPERANDS:]], dict(node.attributes))
    difference = add("Sub", [node.outputs[0], twin], {})
    outputs = [add("ReduceSumSquare", [value], {"keepdims": 0}) for value in (difference, node.outputs[0])]
    for value in outputs:
        value.shape = ir.Shape([])
    model.graph.insert_after(node, made)
    model.graph.outputs.extend(outputs)
    return outputs
