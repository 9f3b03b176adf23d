"""int4 nested in int8: weights of layers with int8 inputs are stored as int4 codes and run as int8 ones.

    weight = (code * factor) * scale     code int4, factor 1..15 of a block of inputs, scale of an output channel; code
                                         * factor is int8

No target has int4 kernels for convolutions, or for products whose inputs are int8. In the canonical graph, such a
weight is

    factors uint8 [G, N] -> Cast -> Mul scales [N]            -> DequantizeLinear codes [K, N] by blocks of K
                                                              -> MatMul
    factors uint8 [O, G] -> Cast -> Mul scales [O], unsqueezed -> DequantizeLinear codes [O, K] by blocks of K ->
            Reshape -> Conv

and what targets run is DequantizeLinear of code * factor, int8, with one scale for each output channel: what they run
of int8 weights. The two are equal but for the order of two products of float32. Codes and factors always lie in the
weights file, never in the graph's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.tensors import open_tensors
from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.lowering.values import shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS: Final = "weights.safetensors"
"""The file of a canonical graph's weights, beside it."""
CODES: Final = ".int4.nested"
"""The end of the name of the initializer that holds the codes; the names of its factors and scales begin with that
name.
"""
FACTORS: Final = ".factors"
SCALES: Final = ".scale"
WEIGHT: Final = ".weight"
"""The value that the layer reads."""


def int8_codes(codes: NDArray[np.uint8], factors: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """int8 codes of a weight of this shape: [K, N] of a product, [O, ...] of a convolution.

    `codes` are int4, two in a byte, the first in the low half; `factors` [G, N] or [O, G].
    """
    product = len(shape) == 2
    signed = codes.view(np.int8).reshape(shape[0], -1)
    wide = np.empty((shape[0], 2 * signed.shape[1]), np.int8)
    np.left_shift(signed, 4, out=wide[:, 0::2])
    wide[:, 0::2] >>= 4
    np.right_shift(signed, 4, out=wide[:, 1::2])
    if product:
        blocks = wide.reshape(len(factors), -1, shape[1])
        blocks *= factors.view(np.int8)[:, None]
    else:
        blocks = wide.reshape(*factors.shape, -1)
        blocks *= factors.view(np.int8)[..., None]
    return wide.reshape(shape)


def widen(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Replace the nested weights of a graph by int8 weights, which are computed when they are read.

    Returns their shapes by the names of the codes that they are made of; their own names are `int8_name` of these.
    """
    ir = require("onnx_ir", "export")
    initializers, made = model.graph.initializers, dict[str, tuple[int, ...]]()
    for name, codes in list(initializers.items()):
        if not name.endswith(CODES):
            continue
        (restored,) = codes.consumers()
        read = restored.outputs[0]
        if read.name != f"{name}{WEIGHT}":
            read = read.consumers()[0].outputs[0]
        shape = shape_of(read).numpy()
        tensor = ir.LazyTensor(
            partial(_int8_tensor, codes.const_value, initializers[f"{name}{FACTORS}"].const_value, shape),
            ir.DataType.INT8,
            ir.Shape(shape),
            name=int8_name(name),
        )
        wide = ir.Value(
            name=int8_name(name), type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(shape), const_value=tensor
        )
        model.graph.register_initializer(wide)
        axis = 1 if len(shape) == 2 else 0
        node = ir.node(
            "DequantizeLinear",
            [wide, initializers[f"{name}{SCALES}"]],
            {"axis": axis},
            name=f"{name}.int8/DequantizeLinear",
        )
        model.graph.insert_before(restored, node)
        node.outputs[0].type, node.outputs[0].shape = read.type, read.shape
        ir.convenience.replace_all_uses_with(read, node.outputs[0])
        node.outputs[0].name, read.name = read.name, f"{read.name}.nested"
        made[name] = shape
    if made:
        require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    return made


def widened(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The result of `widen` for a graph that may have been cut since."""
    ends = int8_name(CODES)
    values = {name: value for name, value in model.graph.initializers.items() if name.endswith(ends)}
    return {name.removesuffix(int8_name("")): shape_of(value).numpy() for name, value in values.items()}


def int8_name(codes: str) -> str:
    """The initializer that `widen` makes of these codes."""
    return f"{codes}.int8"


def _int8_tensor(codes: Any, factors: Any, shape: tuple[int, ...]) -> Any:
    """An onnx_ir tensor made of two others, which are mapped while they are read."""
    wide = int8_codes(np.frombuffer(codes.tobytes(), np.uint8), factors.numpy(), shape)
    for tensor in (codes, factors):
        if hasattr(tensor, "release"):
            tensor.release()
    return require("onnx_ir", "export").tensor(wide)


class Stored:
    """Nested weights of a submodel's weights file (safetensors), mapped. Raises EngineError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tensors = open_tensors(path)
        except (OSError, ValueError) as error:
            raise EngineError(f"could not load {path}: {error}. Build the bundle again") from None

    def int8(self, codes: str, shape: tuple[int, ...]) -> NDArray[np.int8]:
        """The int8 codes of a nested weight."""
        factors = self._array(f"{codes}{FACTORS}")
        return int8_codes(self._array(codes), factors, shape)

    def packed(self, codes: str) -> NDArray[np.uint8]:
        """Codes of 4 bits as they are stored, two in a byte, the first in the low half."""
        return self._array(codes).reshape(-1)

    def _array(self, name: str) -> NDArray[np.uint8]:
        try:
            found = self._tensors[name]
            return np.frombuffer(found.data, np.uint8).reshape(found.shape)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"could not load {self._path}: '{name}' cannot be read ({error}). Build the bundle again"
            ) from None
