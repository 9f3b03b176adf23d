"""A canonical ONNX graph as a MIL program of iOS 18 (macOS 15), translated operator by operator with `operators/`.

Values of the graph become variables of the program, or stay `Constant`s until something reads them. Dequantized and
cast weights never become arrays: they are `constexpr` operations over the stored codes
(https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import EnginecastError, EngineError
from runtime.optional import require
from runtime.targets.coreml.constants import COMPRESSED, Constant, Deferred, of_tensor
from runtime.targets.coreml.operators import OPERATORS
from runtime.targets.coreml.sdk import coremltools
from runtime.targets.lowering.values import dtype_of, operand, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

STANDARD_DOMAINS: Final = ("", "ai.onnx")


def translate(
    model: ir.Model,
    dims: Mapping[str, Any],
    states: Iterable[str] = (),
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Any:
    """The program (coremltools' Program) of a graph.

    `dims` gives each varying dim of the inputs a length or a RangeDim. Inputs named in `states` become states, which
    are float16; the outputs that update them are not outputs of the program. int64 becomes int32, the widest integer of
    Core ML. `progress` is called with the number of bytes of weights as they are read, when the program is written.
    Raises EngineError naming the node and operator that has no translation.
    """
    return _Translator(model, dims, frozenset(states), progress).run()


class _Translator:
    """One pass over the nodes. The operators in `operators/` use `mb`, `var`, `weight`, `constant` and `numbers`."""

    def __init__(
        self, model: ir.Model, dims: Mapping[str, Any], states: frozenset[str], progress: Callable[[int], None]
    ) -> None:
        self.ct = coremltools()
        self.ir = require("onnx_ir", "export")
        self.model, self.dims, self.state_names, self.progress = model, dims, states, progress
        self.values: dict[Any, Any] = {}
        self.states: dict[Any, Any] = {}
        self.updated: set[Any] = set()
        self.follows: dict[Any, Any] = {}
        self.made: dict[tuple[Any, ...], Any] = {}
        self.mb = _Named(require("coremltools.converters.mil", "coreml").Builder)

    def run(self) -> Any:
        mil = require("coremltools.converters.mil.mil", "coreml")
        graph = self.model.graph
        self.mb.reserve(identifier(value.name) for value in (*graph.inputs, *graph.outputs))
        specs = {identifier(value.name): self._spec(value) for value in graph.inputs}
        with mil.Function(specs, opset_version=self.ct.target.iOS18) as function:
            for value in graph.inputs:
                kept = self.states if value.name in self.state_names else self.values
                kept[value] = function.inputs[identifier(value.name)]
            for node in graph:
                if node.outputs[0] not in self.values:
                    self._node(node)
            function.set_outputs(self._outputs())
        program = mil.Program()
        program.add_function("main", function)
        return program

    def _spec(self, value: ir.Value) -> Any:
        types = self.mb.types
        shape = [self._length(dim) for dim in shape_of(value)]
        if value.name in self.state_names:
            return self.mb.builder.StateTensorSpec(shape, types.fp16)
        floats = {"FLOAT": types.fp32, "FLOAT16": types.fp16}
        return self.mb.builder.TensorSpec(shape, floats.get(dtype_of(value).name, types.int32))

    def _length(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        found = self.dims[dim.value]
        return found if isinstance(found, int) else found.symbol

    def _node(self, node: ir.Node) -> None:
        if node.domain not in STANDARD_DOMAINS or node.op_type not in OPERATORS:
            raise EngineError(
                f"node '{node.name}' is a {node.domain or 'standard'} {node.op_type}, which has no translation to Core "
                "ML: "
                "choose another target, or add it to runtime/targets/coreml/operators/"
            )
        self.mb.prefix = identifier(node.name or node.outputs[0].name)
        try:
            results = OPERATORS[node.op_type](self, node)
        except EnginecastError:
            raise
        except Exception as error:  # the builder's own checks of types and shapes
            raise EngineError(
                f"node '{node.name}' ({node.op_type}) could not be translated to Core ML: {error}"
            ) from error
        for output, result in zip(
            node.outputs, results if isinstance(results, (list, tuple)) else [results], strict=False
        ):
            self.values[output] = result
            if output in self.follows:
                self.values[self.follows[output]] = result

    def follow(self, value: ir.Value, by: Any) -> None:
        """Let the result for one value of the graph also stand for another, whose node is then skipped."""
        self.follows[value] = by

    def _outputs(self) -> list[Any]:
        found: list[Any] = []
        for value in self.model.graph.outputs:
            if value in self.updated:
                continue
            var = self.var(value)
            if var.op is None or var.op.op_type == "const" or any(var is other for other in found):
                var = self.mb.builder.identity(x=var, name=identifier(value.name))
            var.name = identifier(value.name)
            found.append(var)
        return found

    def constant(self, value: ir.Value) -> Constant | None:
        """The constant of a value; None where it is computed from inputs."""
        if value not in self.values:
            self._early(value)
        found = self.values.get(value)
        return found if isinstance(found, Constant) else None

    def _early(self, value: ir.Value) -> None:
        """Read constants before their turn: initializers, and casts of them, which stand next to their readers."""
        producer = value.producer()
        if value.is_initializer():
            self.values[value] = of_tensor(value.const_value)
        elif producer is not None and producer.op_type == "Cast" and operand(producer, 0).is_initializer():
            self._node(producer)

    def numbers(self, value: ir.Value) -> Array | None:
        """The values of a small constant; None where the value is computed from inputs."""
        found = None if value is None else self.constant(value)
        return None if found is None else found.array()

    def var(self, value: ir.Value) -> Any:
        """The variable of a value, in the type that the graph declares. A constant becomes a variable once."""
        found = self.constant(value)
        if found is None:
            return self.values[value]
        key = value, "plain"
        if key not in self.made:
            self.made[key] = self.mb.const(val=self._plain(found))
        return self.made[key]

    def _plain(self, constant: Constant) -> Array:
        dtype = np.dtype(
            "int32" if constant.dtype == "int64" else "float32" if constant.dtype == "float64" else constant.dtype
        )
        values: Any = constant.array()
        return values.clip(-(2**31), 2**31 - 1).astype(dtype) if dtype == np.int32 else values.astype(dtype)  # type: ignore[no-any-return]

    def weight(self, value: ir.Value, order: tuple[int, ...] = ()) -> Any:
        """A constant that is read by a product, a convolution or a table: in its compressed form, with its axes in the
        given order.
        """
        constant = self.constant(value)
        if constant is None or (constant.size < COMPRESSED and not order and constant.scale is None):
            return self.var(value)
        key = value, order
        if key not in self.made:
            self.made[key] = self._compressed(constant.transposed(order) if order else constant)
        return self.made[key]

    def _compressed(self, constant: Constant) -> Any:
        types = self.mb.types
        dtype = types.np_int4_dtype if constant.stored == "int4" else np.dtype(constant.stored)
        if constant.scale is None and constant.size < COMPRESSED:
            return self.mb.const(val=self._plain(constant))
        codes = self.mb.const(val=Deferred.of(constant.shape, dtype, lambda: self._counted(constant.read())))
        if constant.scale is None and constant.dtype == constant.stored:
            return codes
        if constant.scale is None:
            return self.mb.constexpr_cast(
                source_val=codes, output_dtype="fp32" if constant.dtype == "float32" else "fp16"
            )
        scale = np.ascontiguousarray(constant.scale)
        if constant.offset is None:
            return self.mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)
        return self.mb.constexpr_blockwise_shift_scale(
            data=codes, scale=scale, offset=np.ascontiguousarray(constant.offset).astype(dtype)
        )

    def _counted(self, values: Array) -> Array:
        self.progress(values.nbytes)
        return values


class _Named:
    """coremltools' Builder. Operations are named after the node they are made for, with a number from the second one
    on.
    """

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.types = require("coremltools.converters.mil.mil.types", "coreml")
        self.prefix = ""
        self.taken: set[str] = set()

    def reserve(self, names: Iterable[str]) -> None:
        self.taken.update(names)

    def __getattr__(self, operation: str) -> Any:
        def add(**inputs: Any) -> Any:
            return getattr(self.builder, operation)(**inputs, name=self._free())

        return add

    def _free(self) -> str:
        name, number = self.prefix, 0
        while name in self.taken:
            number += 1
            name = f"{self.prefix}_{number}"
        self.taken.add(name)
        return name


def identifier(name: str | None) -> str:
    """The name in the form that Core ML accepts: letters, digits and underscores, not beginning with a digit."""
    plain = re.sub(r"\W", "_", name or "", flags=re.ASCII)
    return f"_{plain}" if plain[:1].isdigit() else plain
