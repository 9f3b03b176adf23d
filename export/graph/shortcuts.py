"""What torch's exporter computes again and again, left out of a trace; the graph is the same without it.

Everything here replaces functions inside torch for the time of one trace, and is tested against traces without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Final
from unittest.mock import patch

from torch import fx
from torch._dynamo import config as dynamo
from torch._export import utils as exporting
from torch._logging._internal import trace_log
from torch.fx import config as fx_config
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import SymNode
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion
from torch.utils._sympy.functions import IntTrueDiv

from export.graph.decomposing import where_needed
from export.graph.shapes import given_shapes

OPERATIONS: Final = ("add", "sub", "mul", "eq", "ne", "ge", "gt", "le", "lt")
"""Operations on symbolic sizes whose result depends on nothing but the two expressions."""
Promotion = type_promotion._TypePromotionInterpreter
registry = cache(ONNXRegistry.from_torchlib)
"""The functions that translate torch's operators to ONNX. torch reads their source code again for each trace, which
takes 0.6 s; nothing adds to them.
"""


@contextmanager
def shortcuts() -> Iterator[None]:
    """A trace within this block takes less time."""
    with ExitStack() as stack:
        changes: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (symbolic_shapes, "_has_uninterpretable_sympy_function", _without_quotients),
            (Promotion, "run_node", _where_types_differ),
            (SymNode, "maybe_as_int", _once_for_each_size),
            (_fx_passes, "decompose_with_registry", where_needed),
            (ONNXRegistry, "from_torchlib", lambda _: staticmethod(registry)),
            (exporting, "_materialize_cpp_cia_ops", cache),  # asked once for each of some fifty libraries of operators
            *((SymNode, operation, _once_for_each_pair) for operation in OPERATIONS),
        ]
        for owner, name, changed in changes:
            stack.enter_context(patch.object(owner, name, changed(getattr(owner, name))))
        stack.enter_context(given_shapes())
        stack.enter_context(patch.object(trace_log, "handlers", []))  # a record of every size, which nobody reads
        stack.enter_context(patch.object(fx_config, "do_not_emit_stack_traces", True))  # one of each node, likewise
        # its keys of symbolic sizes take longer than computing a shape again
        stack.enter_context(dynamo.patch(fake_tensor_cache_enabled=False))
        yield


def _without_quotients(known: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Leaves out checks of quotients of lengths, such as those of diffusers' Upsample2D. The tracer cannot write them
    as nodes, would fail, and make the whole trace a second time in another way; no ONNX graph has such checks.
    """
    return lambda expression: known(expression) or expression.has(IntTrueDiv)


def _where_types_differ(run: Callable[..., Any]) -> Callable[..., Any]:
    """Computes a node again only where a rule may change the types of its inputs; the results of others are known."""

    def run_node(self: Promotion, node: fx.Node) -> Any:
        if "val" in node.meta and not type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
            return node.meta["val"]
        return run(self, node)

    return run_node


def _once_for_each_size(operation: Callable[[SymNode], int | None]) -> Callable[[SymNode], int | None]:
    results: dict[Any, int | None] = {}

    def kept(self: SymNode) -> int | None:
        key = _identity(self)
        if key not in results:
            results[key] = operation(self)
        return results[key]

    return kept


def _once_for_each_pair(operation: Callable[[SymNode, Any], SymNode]) -> Callable[[SymNode, Any], SymNode]:
    """torch asks the same of every tensor: how many elements, is it contiguous, are two lengths equal. Of 190,000
    operations in a trace of a small UNet 3,000 are different. Those that become nodes of the graph are done each time.
    """
    results: dict[Any, SymNode] = {}

    def kept(self: SymNode, other: Any) -> SymNode:
        if type(other) is not SymNode or get_proxy_mode():
            return operation(self, other)
        key = _identity(self), _identity(other)
        if key not in results:
            results[key] = operation(self, other)
        return results[key]

    return kept


def _identity(node: SymNode) -> tuple[Any, ...]:
    """What results depend on: the expression, as far as its symbols are known by now, and what it stands for."""
    env = node.shape_env
    return id(env), env and env._replacements_version_counter, node._expr, node.pytype, node._hint
