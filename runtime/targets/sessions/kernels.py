"""The kernels of ONNX Runtime's providers, from the tables beside this file, and the nodes of a graph that have
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from runtime.errors import EngineError
from runtime.optional import require

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET: Final = 21
"""The latest opset with kernels for all its operators. 22 changed Conv, Cos and Sin: DirectML has not followed, and
CUDA not for Cos and Sin.
"""
TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype")
"""Attributes that name the type of an output."""


class Provider(NamedTuple):
    """A provider's name and its table. `spread`: its MultiHeadAttention needs a mask for every row and head."""

    name: str
    table: Path
    spread: bool


DIRECTML: Final = Provider("DirectML", Path(__file__).with_name("directml_kernels.txt"), spread=True)
CUDA: Final = Provider("CUDA", Path(__file__).with_name("cuda_kernels.txt"), spread=False)


class Kernel(NamedTuple):
    """One entry: the operator's versions and the types of each type variable.

    `inputs` and `outputs` are the variables of operators outside of the standard, which have no schema.
    """

    versions: frozenset[int]
    types: Mapping[str, frozenset[str]]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@cache
def kernels(table: Path) -> Mapping[tuple[str, str], tuple[Kernel, ...]]:
    """Every entry of a table by domain ("" is the standard's) and operator."""
    sets: dict[str, tuple[str, ...]] = {}
    found: dict[tuple[str, str], list[Kernel]] = {}
    domain = ""
    for line in table.read_text().splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if words[0] == "set":
            sets[words[1]] = tuple(words[2:])
        elif words[0] == "domain":
            domain = "" if words[1] == "ai.onnx" else words[1]
        else:
            found.setdefault((domain, words[0]), []).append(_kernel(words, sets))
    return {key: tuple(entries) for key, entries in found.items()}


def _kernel(words: Sequence[str], sets: Mapping[str, tuple[str, ...]]) -> Kernel:
    """An entry from its line: operator, versions, types, and variables after a colon."""
    colon = words.index(":") if ":" in words else len(words)
    types = {}
    for word in words[2:colon]:
        variable, _, names = word.partition("=")
        types[variable] = frozenset(name for one in names.split(",") for name in sets.get(one, (one,)))
    rest = list(words[colon + 1 :])
    split = rest.index(">") if rest else 0
    versions = (one.partition("-") for one in words[1].split(","))
    numbers = (number for first, _, last in versions for number in range(int(first), int(last or first) + 1))
    return Kernel(frozenset(numbers), types, tuple(rest[:split]), tuple(rest[split + 1 :]))


def covers(provider: Provider, operator: str) -> bool:
    """Whether the provider has a kernel of a standard operator, in its version in opset 21, for some types."""
    schemas = require("onnx.defs", "export")
    if not schemas.has(operator, OPSET, ""):
        return False
    version = schemas.get_schema(operator, OPSET, "").since_version
    return any(version in entry.versions for entry in kernels(provider.table).get(("", operator), ()))


def check(model: ir.Model, provider: Provider, name: str) -> None:
    """Raise EngineError naming nodes of a graph that a provider has no kernel for. `name` is the submodel's."""
    unsupported = [f"node '{node.name}' ({_operator(node)}: {reason})" for node, reason in outside(model, provider)]
    if unsupported:
        more = f", and {len(unsupported) - 5} more" if len(unsupported) > 5 else ""
        raise EngineError(
            f"could not compile {name}: {provider.name} has no kernel for {'; '.join(unsupported[:5])}{more}. Expected "
            "operators of opset "
            f"{OPSET} in the types of its table: choose another target, or let the submodel compute in float32 or "
            "float16"
        )


def outside(model: ir.Model, provider: Provider) -> Iterator[tuple[ir.Node, str]]:
    """Each node that a provider has no kernel for, with the reason. Sets the types of values that have none, which
    follow from their nodes.
    """
    for node in model.graph:
        reason = _Reader(model, node, kernels(provider.table)).reason()
        if reason:
            yield node, reason


def _operator(node: ir.Node) -> str:
    return f"{node.domain + '.' if node.domain else ''}{node.op_type}"


class _Reader:
    """Compares one node with the table."""

    def __init__(self, model: ir.Model, node: ir.Node, table: Mapping[tuple[str, str], tuple[Kernel, ...]]) -> None:
        self.ir, self.node = require("onnx_ir", "export"), node
        self.declared = model.opset_imports.get(node.domain, 1)
        self.entries = table.get((node.domain, node.op_type), ())

    def reason(self) -> str:
        """Why there is no kernel; empty where there is one."""
        if self.node.domain:
            return self._match(1, *((self.entries[0].inputs, self.entries[0].outputs) if self.entries else ((), ())))
        if self.declared != OPSET:
            return f"the graph declares opset {self.declared}"
        schemas = require("onnx.defs", "export")
        if not schemas.has(self.node.op_type, OPSET, ""):
            return f"opset {OPSET} has no such operator"
        schema = schemas.get_schema(self.node.op_type, OPSET, "")
        unknown = set(self.node.attributes) - set(schema.attributes)
        if unknown:
            return f"version {schema.since_version} has no attribute {sorted(unknown)[0]}"
        only = {
            found.type_param_str: found.allowed_type_strs[0]
            for found in schema.type_constraints
            if len(found.allowed_type_strs) == 1
        }
        inputs = [formal.type_str for formal in schema.inputs]
        outputs = [
            formal.type_str if formal.type_str in inputs else only.get(formal.type_str, formal.type_str)
            for formal in schema.outputs
        ]
        return self._match(schema.since_version, inputs, outputs)

    def _match(self, version: int, inputs: Sequence[str], outputs: Sequence[str]) -> str:
        bound = self._bind(inputs, outputs)
        fitting = [entry for entry in self.entries if version in entry.versions]
        if not fitting:
            known = sorted({version for entry in self.entries for version in entry.versions})
            return f"version {version}, it has {', '.join(map(str, known)) or 'none'}"
        for variable, dtype in bound.items():
            if not any(dtype in entry.types.get(variable, (dtype,)) for entry in fitting):
                allowed = sorted({name for entry in fitting for name in entry.types[variable]})
                return f"{variable} is {dtype}, it has {', '.join(allowed)}"
        return ""

    def _bind(self, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
        """The type of each type variable, inputs first. Outputs without a type get one."""
        bound: dict[str, str] = {}
        for value, variable in _paired(self.node.inputs, inputs):
            if value is not None:
                bound.setdefault(variable, _name(value.dtype))
        for value, variable in _paired(self.node.outputs, outputs):
            if value.dtype is None:
                value.type = self.ir.TensorType(self._made(bound, variable))
            bound.setdefault(variable, _name(value.dtype))
        return {variable: dtype for variable, dtype in bound.items() if not variable.startswith("tensor(")}

    def _made(self, bound: Mapping[str, str], variable: str) -> Any:
        """The type of an output that the graph does not state."""
        for name in TYPE_ATTRIBUTES:
            if name in self.node.attributes:
                return self.ir.DataType(self.node.attributes[name].as_int())
        text = bound.get(variable) or variable.removeprefix("tensor(").removesuffix(")")
        if text.upper() not in self.ir.DataType.__members__:
            raise EngineError(
                f"the type of what node '{self.node.name}' ({self.node.op_type}) gives is unknown: build the bundle "
                "again"
            )
        return self.ir.DataType[text.upper()]


def _paired(values: Sequence[Any], variables: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Each operand with its type variable; the last variable may cover any number of operands."""
    for index, value in enumerate(values):
        if variables:
            yield value, variables[min(index, len(variables) - 1)]


def _name(dtype: Any) -> str:
    """The name of a type in the table."""
    return "none" if dtype is None else str(dtype.name).lower()
