"""Packages: what was written is read back to the bit, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EngineError
from runtime.targets.coreml.package import MODEL, WEIGHTS, Package, unpacked


@settings(max_examples=30)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9))
def test_four_bit_numbers_are_unpacked(codes: list[int]) -> None:
    padded = [*codes, 0]
    packed = np.array(
        [(low & 15) | (high & 15) << 4 for low, high in zip(padded[::2], padded[1::2], strict=False)], np.uint8
    )
    assert unpacked(packed, len(codes)).tolist() == codes


@pytest.fixture
def written(compute: Any, tmp_path: Path) -> Path:
    weight = np.arange(40 * 200, dtype=np.float32).reshape(40, 200)
    compute([("MatMul", "x w", "y", {})], {"x": np.ones((2, 40), np.float32)}, {"w": weight}, "y")
    return tmp_path / "1.mlpackage"


def test_weights_are_those_that_were_written(written: Path) -> None:
    package = Package(written)
    assert package.outputs == ["y"]
    (weight,) = (
        operation
        for operation in package.operations
        if operation.type == "const" and len(operation.outputs[0].type.tensorType.dimensions) == 2
    )
    blob = package.blob(weight.attributes["val"].blobFileValue.offset, "float32", (200, 40))
    np.testing.assert_array_equal(blob, np.arange(40 * 200, dtype=np.float32).reshape(40, 200).T)


@pytest.mark.parametrize(
    "damage", ["no model", "no program", "garbage", "no weights", "short weights", "other weights"]
)
def test_damage_is_named(written: Path, damage: str) -> None:
    model, weights = written / MODEL, written / WEIGHTS
    if damage == "no model":
        model.unlink()
    elif damage == "no program":
        model.write_bytes(b"")
    elif damage == "garbage":
        model.write_bytes(b"\xff" * 64)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "short weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.write_bytes(b"\0" * weights.stat().st_size)
    with pytest.raises(EngineError, match="Build the bundle again"):
        package = Package(written)
        for operation in package.operations:
            if operation.attributes["val"].WhichOneof("value") == "blobFileValue":
                dims = tuple(dim.constant.size for dim in operation.outputs[0].type.tensorType.dimensions)
                package.blob(operation.attributes["val"].blobFileValue.offset, "float32", dims)
