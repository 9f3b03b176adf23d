"""What targets say of themselves."""

from __future__ import annotations

import pytest

from calibration.quantize.recipes import RECIPES
from runtime.engine import check_precisions, targets
from runtime.errors import InvalidInput, NotFound


@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if not (found.fp8 or found.nf4)])
def test_every_target_takes_what_all_can(recipe: str) -> None:
    check_precisions(targets(), RECIPES[recipe].precisions)


@pytest.mark.parametrize(
    ("name", "recipe", "known"),
    [
        ("onnxruntime", "fp8", "float32, int4, int8"),
        ("openvino", "fp8", "float32, int4, int8, nf4"),
        ("onnxruntime", "nf4", "float32, int4, int8"),
        ("directml", "nf4", "float16, float32, int4, int8"),
        ("cuda", "nf4", "bfloat16, float16, float32, int4, int8"),
        ("coreml", "nf4", "float16, float32, int4, int8"),
        ("tensorrt", "nf4", "bfloat16, float16, float32, fp8, int4, int8"),
        ("tensorrt-rtx", "nf4", "bfloat16, float16, float32, fp8, int4, int8"),
    ],
)
def test_what_would_be_emulated_is_refused(name: str, recipe: str, known: str) -> None:
    with pytest.raises(
        InvalidInput, match=f"target: {name} cannot compute in {recipe}, only in {known}: choose another --quant"
    ):
        check_precisions([name], RECIPES[recipe].precisions)


def test_targets_that_can_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets()["openvino"], "precisions", frozenset({"float32", "int8", "int4", "fp8"}))
    check_precisions(["openvino"], RECIPES["fp8"].precisions)
    with pytest.raises(InvalidInput, match=r"of the targets .*openvino"):
        check_precisions(["openvino", "onnxruntime"], RECIPES["fp8"].precisions)


def test_unknown_targets_are_named() -> None:
    with pytest.raises(NotFound, match="did you mean 'openvino'"):
        check_precisions(["openvin"], {"int8"})
