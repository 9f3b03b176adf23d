"""What is said of the weights of a bundle."""

from __future__ import annotations

from export.report.sizes import forms, megabytes
from runtime.bundle.manifest import Submodel, Weights
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Signature

CODES = Weights(form="int4", elements=750, nbytes=400)
TABLES = Weights(form="float16", elements=50, nbytes=100, reason="tables")
LAST = Weights(form="int8", elements=200, nbytes=20_000_000, reason="makes the output")


def submodel(*weights: Weights) -> Submodel:
    return Submodel(
        name="unet",
        signature=Signature(inputs=(), outputs=()),
        graph="g",
        precision=Precision.parse("int4"),
        nbytes=0,
        weights=weights,
    )


def test_forms_say_shares_and_reasons_over_all_submodels() -> None:
    assert forms([submodel(CODES, TABLES), submodel(LAST)], "int4") == (
        "int4 75.0 % (0.000 MB), int8 20.0 % (20.0 MB), float16 5.0 % (0.000 MB). Not int4: 20.0 % makes the output; "
        "5.0 % tables"
    )
    assert forms([submodel(CODES)], "int4") == "int4 100.0 % (0.000 MB)", "nothing else to say"
    assert forms([submodel()], "int4") == "", "a bundle from before, or one that is not quantized"


def test_sizes_have_three_digits() -> None:
    assert [megabytes(size) for size in (1234, 1_234_567, 12_345_678, 1_234_567_890)] == [
        "0.001 MB",
        "1.235 MB",
        "12.3 MB",
        "1235 MB",
    ]
