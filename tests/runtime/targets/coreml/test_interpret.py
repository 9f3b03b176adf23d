"""The interpreter: nothing that the program declares may be otherwise, and what its arithmetic is made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EngineError
from runtime.targets.coreml.interpret import Interpreter
from runtime.targets.coreml.kernels import KERNELS
from runtime.targets.coreml.kernels.elementwise import erf
from runtime.targets.coreml.package import Package


@settings(max_examples=200)
@given(st.floats(-10, 10))
def test_the_error_function(x: float) -> None:
    assert abs(float(erf(np.float64(x))) - math.erf(x)) < 1.5e-7


@pytest.fixture
def interpreter(compute: Any, tmp_path: Path) -> Interpreter:
    nodes = [("Cast", "x", "half", {"to": 10}), ("Mul", "half half", "square", {}), ("Cast", "square", "y", {"to": 1})]
    compute(nodes, {"x": np.ones((2, 3), np.float32)}, {}, "y", True)
    return Interpreter(Package(tmp_path / "1.mlpackage"))


def test_every_step_is_rounded_to_its_type(interpreter: Interpreter) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(interpreter.predict({"x": x})["y"], (half.astype(np.float32) ** 2).astype(np.float16))
    assert np.isinf(interpreter.predict({"x": np.full((1, 3), 300, np.float32)})["y"]).all(), "beyond 65504"


def test_what_is_not_declared_is_refused(interpreter: Interpreter) -> None:
    for wrong in (np.ones((2, 4), np.float32), np.ones(3, np.float32), np.ones((2, 3))):
        with pytest.raises(EngineError, match=r"input 'x' is float\d\d \(.*expected float32 \(None, 3\)"):
            interpreter.predict({"x": wrong})
    with pytest.raises(EngineError, match="input 'x' is missing"):
        interpreter.predict({})


def test_a_result_other_than_declared_is_an_error(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "mul", lambda x, y: (x * y)[:, :1])
    with pytest.raises(EngineError, match=r"operation '\w+' \(mul\) is float16 \(2, 1\), expected float16 \(None, 3\)"):
        interpreter.predict({"x": np.ones((2, 3), np.float32)})


def test_an_unknown_operation_is_named(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, "mul")
    with pytest.raises(EngineError, match="operation mul cannot be computed here"):
        Interpreter(interpreter.package)


def test_what_is_not_read_any_more_is_let_go(interpreter: Interpreter) -> None:
    live: set[str] = set(interpreter.inputs)
    peak = 0
    for step in interpreter.steps:
        live |= {output.name for output in step.outputs}
        peak = max(peak, len(live))
        live -= set(step.last)
    assert live == set(interpreter.package.outputs) and peak <= 3
