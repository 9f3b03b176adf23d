"""One matrix product as a submodel, in each precision that engines have kernels for. Needs the extra export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from calibration.observe.ranges import Range
from calibration.quantize.plan import activation_tensors, plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES, Recipe
from export.graph.weights import precision, write
from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Compute
from runtime.bundle.signature import Signature, Tensor

EDGE: Final = 2048
"""Rows, inputs and outputs of the product: large enough that arithmetic is the limit, small enough to be quick."""
OPERATIONS: Final = 2 * EDGE**3
"""A multiplication and an addition for each element of each sum."""
INPUT, OUTPUT = "x", "y"
PRECISIONS: Final = ("float32", "bfloat16", "float16", "int8", "int4")
"""What products are made in: int8 with int8 inputs, int4 weights with inputs as the engine takes them."""
_RECIPES: Final[dict[str, Recipe]] = {"int8": RECIPES["int8"], "int4": replace(INT4_EVERYWHERE, name="int4")}
_COMPUTE: Final[dict[str, Compute]] = {"bfloat16": "bfloat16", "float16": "float16"}


def product(form: str, folder: Path) -> Submodel:
    """The product in one of `PRECISIONS`, with its graph and weights in a bundle's places below `folder`."""
    model = _graph()
    if form in _RECIPES:
        recipe = _RECIPES[form]
        ranges = {name: Range(peak=4.0, snr_db=60.0) for name in activation_tensors(model, recipe)}
        model = quantize(model, plan(model, recipe, ranges), ranges)
    nbytes = write(model, folder / "onnx" / form)
    dims = (1, EDGE, EDGE)
    made = Submodel(
        name=form,
        signature=Signature(
            inputs=(Tensor(name=INPUT, dtype="float32", dims=dims),),
            outputs=(Tensor(name=OUTPUT, dtype="float32", dims=dims),),
        ),
        graph=f"onnx/{form}/model.onnx",
        precision=precision(model),
        nbytes=nbytes,
        dynamic=form == "int4",
    )
    return made.computing(_COMPUTE[form]) if form in _COMPUTE else made


def _graph() -> ir.Model:
    """y = x w in float32, of random numbers."""
    weight = ir.tensor(np.random.default_rng(0).standard_normal((EDGE, EDGE), np.float32) / EDGE**0.5, name="w")
    shape = ir.Shape((1, EDGE, EDGE))
    x, y = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape) for name in (INPUT, OUTPUT))
    kind = ir.TensorType(weight.dtype)
    w = ir.Value(name="w", type=kind, shape=ir.Shape((EDGE, EDGE)), const_value=weight)
    node = ir.Node("", "MatMul", [x, w], outputs=[y], name="product")
    return ir.Model(
        ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 23}, name="product"), ir_version=10
    )
