"""The fields of a precision and its label."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.bundle.precision import Precision

FORMS = st.lists(st.sampled_from(["float32", "float16", "bfloat16", "int8", "int4", "int64", "uint8"]), unique=True)


@given(FORMS, st.sampled_from(["", " W8A8", " W4A8"]))
def test_a_label_is_read_as_it_is_printed(forms: list[str], end: str) -> None:
    label = " + ".join(forms) + end
    found = Precision.parse(label)
    assert str(found) == f"{found}" == label and found.weights == tuple(forms)
    assert (found.activations, found.nested) == ("int8" if end else "float", end == " W4A8")


@pytest.mark.parametrize(
    ("label", "activations", "quantized"),
    [("fp8 W8A8", "fp8", True), ("fp8 + int8 W8A8", "fp8", True), ("int4", "float", True), ("int64", "float", False)],
)
def test_what_a_label_says(label: str, activations: str, quantized: bool) -> None:
    found = Precision.parse(label, "float16")
    assert (found.activations, found.quantized, found.compute) == (activations, quantized, "float16")


@pytest.mark.parametrize("label", ["int8 & more", "int8 W8A8 W8A8", " ", "int8 +", "\u202eint8", "x" * 99])
def test_what_is_no_label(label: str) -> None:
    with pytest.raises(ValidationError):
        Precision.parse(label)
