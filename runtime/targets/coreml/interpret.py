"""A package interpreted with numpy: it computes what Core ML would, on machines without Core ML, from the package
alone.

Each operation is computed in 32 bits and rounded to the type that the program declares for it; shapes and types are
compared with the declared ones. The interface is that of coremltools' MLModel: `predict`, `make_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import EngineError
from runtime.targets.coreml.kernels import KERNELS, MOVES
from runtime.targets.coreml.package import Package

DTYPES: Final[Mapping[int, str]] = {
    **{
        1: "bool",
        2: "str",
        10: "float16",
        11: "float32",
        21: "int8",
        22: "int16",
        23: "int32",
        25: "int4",
        31: "uint8",
        32: "uint16",
    }
}
"""MIL's numbers of types (MIL.proto of coremltools 9.0, enum DataType)."""


class StateArrays(dict[str, Array]):
    """Arrays by name, with coremltools' interface of MLState."""

    def read_state(self, name: str) -> Array:
        return self[name].copy()

    def write_state(self, name: str, value: Array) -> None:
        self[name] = value


class Output(NamedTuple):
    """The declared type and shape of a variable; None is a length that varies."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Instruction(NamedTuple):
    """An operation: its function, its inputs (variables by name, and constants in the program), and the variables that
    are not read after it.
    """

    kind: str
    variables: Mapping[str, str | list[str]]
    values: Mapping[str, Callable[[], Any]]
    outputs: list[Output]
    last: list[str]


class Interpreter:
    """A program that was read from its package. Weights stay in their file and are decompressed for each use."""

    def __init__(self, package: Package) -> None:
        """Raises EngineError naming the first operation that is not known."""
        self.package = package
        self.state_types = {
            feature.name: tuple(feature.type.stateType.arrayType.shape) for feature in package.spec.description.state
        }
        self.inputs = {
            value.name: _declared(value) for value in package.function.inputs if value.name not in self.state_types
        }
        self.steps = [self._step(operation) for operation in package.operations]
        self._mark_last()

    def make_state(self) -> StateArrays:
        """States filled with zeros, in 16 bits."""
        return StateArrays({name: np.zeros(shape, np.float16) for name, shape in self.state_types.items()})

    def predict(self, data: Mapping[str, Array], state: StateArrays | None = None) -> dict[str, Array]:
        """The outputs by name. `state` is updated. Raises EngineError naming the operation that cannot be computed."""
        known: dict[str, Any] = {}
        for name, declared in self.inputs.items():
            if name not in data:
                raise EngineError(f"input '{name}' is missing")
            known[name] = _fits(declared, np.asarray(data[name]), f"input '{name}'")
        for step in self.steps:
            try:
                results = self._compute(step, known, state)
            except (ArithmeticError, AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
                raise EngineError(
                    f"operation '{step.outputs[0].name}' ({step.kind}) could not be computed: {error}"
                ) from error
            for output, result in zip(step.outputs, results, strict=True):
                known[output.name] = (
                    result
                    if isinstance(result, str)
                    else _fits(output, np.asarray(result), f"operation '{output.name}' ({step.kind})")
                )
            for name in step.last:
                known.pop(name, None)
        return {name: np.array(known[name]) for name in self.package.outputs}

    def _compute(self, step: Instruction, known: Mapping[str, Any], state: StateArrays | None) -> Sequence[Any]:
        if step.kind in ("read_state", "write_state"):
            if state is None:
                raise ValueError("it needs a state")
            name = str(step.variables["input"])
            if step.kind == "write_state":
                state[name] = known[str(step.variables["data"])].copy()
                return ()
            return (state[name].copy(),)
        inputs = {name: read() for name, read in step.values.items()}
        for name, variable in step.variables.items():
            inputs[name] = known[variable] if isinstance(variable, str) else [known[one] for one in variable]
        if step.kind not in MOVES:
            inputs = {name: _wide(value) for name, value in inputs.items()}
        result = inputs["val"] if step.kind == "const" else KERNELS[step.kind](**inputs)
        results = result if isinstance(result, list) else [result]
        halves = [output.dtype == "float16" for output in step.outputs]
        with np.errstate(over="ignore"):
            return [_rounded(value) if half else value for value, half in zip(results, halves, strict=True)]

    def _step(self, operation: Any) -> Instruction:
        if operation.type not in ("const", "read_state", "write_state") and operation.type not in KERNELS:
            raise EngineError(f"operation {operation.type} cannot be computed here: add it to runtime/mil/kernels/")
        variables: dict[str, str | list[str]] = {}
        values: dict[str, Callable[[], Any]] = {}
        for name, argument in operation.inputs.items():
            bindings = argument.arguments
            if bindings[0].WhichOneof("binding") == "value":
                values[name] = self._value(bindings[0].value)
            else:
                variables[name] = (
                    [one.name for one in bindings] if len(bindings) > 1 or name == "values" else bindings[0].name
                )
        values |= {name: self._value(value) for name, value in operation.attributes.items() if name != "name"}
        return Instruction(operation.type, variables, values, [_declared(value) for value in operation.outputs], [])

    def _value(self, value: Any) -> Callable[[], Any]:
        """A function that reads a value: weights from their file each time, other constants once from the program."""
        declared = value.type.tensorType
        dtype = DTYPES[declared.dataType]
        shape = tuple(int(dim.constant.size) for dim in declared.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            offset = value.blobFileValue.offset
            return lambda: self.package.blob(offset, dtype, shape)
        held = _immediate(value.immediateValue.tensor, dtype, shape)
        return lambda: held

    def _mark_last(self) -> None:
        """Record for each step the variables that no later step reads."""
        seen = set(self.package.outputs)
        for step in reversed(self.steps):
            read = {
                name for found in step.variables.values() for name in ([found] if isinstance(found, str) else found)
            }
            made = {output.name for output in step.outputs}
            step.last.extend((read | made) - seen)
            seen |= read


def _declared(value: Any) -> Output:
    declared = value.type.tensorType
    return Output(value.name, DTYPES[declared.dataType], tuple(_length(dim) for dim in declared.dimensions))


def _length(dim: Any) -> int | None:
    return int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else None


def _fits(declared: Output, array: Array, what: str) -> Array:
    """The array, if it has the declared type and shape. Raises EngineError."""
    lengths = all(length in (None, found) for length, found in zip(declared.shape, array.shape, strict=False))
    if array.dtype != declared.dtype or array.ndim != len(declared.shape) or not lengths:
        raise EngineError(f"{what} is {array.dtype} {array.shape}, expected {declared.dtype} {declared.shape}")
    return array


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(one) for one in value]
    return (
        value.astype(np.float32) if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float16 else value
    )


def _rounded(value: Any) -> Any:
    return value.astype(np.float16) if value.dtype == np.float32 else value


def _immediate(tensor: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """A constant in the program: a text or an array."""
    kind = tensor.WhichOneof("value")
    if dtype == "str":
        return str(tensor.strings.values[0])
    data = (
        np.frombuffer(tensor.bytes.values, dtype) if kind == "bytes" else np.array(getattr(tensor, kind).values, dtype)
    )
    return data.reshape(shape)
