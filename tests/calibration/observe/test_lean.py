"""The lean engine gives what the optimised one gives, on every submodel of a model with states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.observe.lean import LeanEngine, lean_session
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.engine import Engine, Options, Slot
from runtime.errors import EngineError
from runtime.targets.onnxruntime.engine import ONNXRuntime


def both(bundle: Path, submodel: str) -> tuple[Engine, Engine]:
    found = Bundle(bundle).submodel(submodel)
    return LeanEngine.load(found, bundle, Options()), ONNXRuntime.load(found, bundle, Options())


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("submodel", ["vision_encoder", "token_embedding"])
def test_without_states(tiny_bundle: Path, submodel: str) -> None:
    lean, fast = both(tiny_bundle, submodel)
    signature = lean.submodel.signature
    inputs = signature.sample(signature.sample_lengths())
    same(lean.run(inputs), fast.run(inputs))


def test_states_go_on_and_are_cut(tiny_bundle: Path) -> None:
    lean, fast = both(tiny_bundle, "decoder")
    signature, slots = lean.submodel.signature, (Slot(), Slot())

    def step(past: int, sequence: int) -> None:
        lengths = {"batch": 1, "sequence": sequence, "past": past, "total": past + sequence}
        inputs = {tensor.name: signature.sample(lengths)[tensor.name] for tensor in signature.inputs}
        same(lean.run(inputs, slots[0]), fast.run(inputs, slots[1]))

    step(0, 5)
    step(5, 1)
    for engine, slot in zip((lean, fast), slots, strict=True):
        engine.trim(slot, 3)
    step(3, 1)
    for engine, slot in zip((lean, fast), slots, strict=True):
        engine.trim(slot, 0)
    step(0, 2)


def test_what_cannot_run_is_named(tiny_bundle: Path) -> None:
    lean, _ = both(tiny_bundle, "vision_encoder")
    with pytest.raises(EngineError, match="vision_encoder"):
        lean.run({})


def test_the_graph_given_stays_as_it_was(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "onnx" / "decoder" / "model.onnx")
    before = [node.name for node in model.graph]
    lean_session(model)
    assert [node.name for node in model.graph] == before
