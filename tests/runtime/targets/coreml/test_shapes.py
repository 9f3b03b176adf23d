"""Settings of shapes, the lengths that follow, and which shapes a package says it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runtime.bundle.signature import BATCH, Dim, Signature, State, Tensor
from runtime.errors import InvalidInput
from runtime.targets.coreml.shapes import CoreMLSettings, Taken, lengths_of
from runtime.targets.lowering.static_cache import capacity

HEIGHT = Dim(name="height", min=0, opt=64, max=128, multiple=8)
PICTURE = Signature(
    inputs=(Tensor(name="sample", dtype="float32", dims=(BATCH, 4, HEIGHT)),),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH,)),),
)
SEQUENCE, PAST = Dim(name="sequence", min=1, opt=1, max=512), Dim(name="past", min=0, opt=16, max=511)
TOTAL = Dim(name="total", min=1, opt=17, max=512, sum_of=("past", "sequence"))
CACHE = Tensor(name="past_key", dtype="float32", dims=(BATCH, 2, PAST, 4))
DECODER = Signature(
    inputs=(
        Tensor(name="inputs_embeds", dtype="float32", dims=(BATCH, SEQUENCE, 8)),
        Tensor(name="position_ids", dtype="int64", dims=(BATCH, SEQUENCE)),
        Tensor(name="attention_mask", dtype="int64", dims=(BATCH, TOTAL)),
    ),
    outputs=(Tensor(name="logits", dtype="float32", dims=(BATCH, 1, 9)),),
    states=(State(past=CACHE, present=CACHE, axis=2),),
)


def test_lengths_are_the_signatures_by_default() -> None:
    assert lengths_of(PICTURE, CoreMLSettings()) == {"batch": (1, 2, 64), "height": (8, 64, 128)}
    assert lengths_of(PICTURE, CoreMLSettings(shapes="fixed")) == {"batch": (2, 2, 2), "height": (64, 64, 64)}
    chosen = CoreMLSettings.parse({"lengths": "batch=1,height=16:32:64"})
    assert lengths_of(PICTURE, chosen) == {"batch": (1, 1, 1), "height": (16, 32, 64)}


def test_rows_of_a_decoder_are_computed_one_by_one() -> None:
    assert lengths_of(DECODER, CoreMLSettings(context=100)) == {"batch": (1, 1, 1), "sequence": (1, 64, 100)}
    assert lengths_of(DECODER, CoreMLSettings(context=40)) == {"batch": (1, 1, 1), "sequence": (1, 40, 40)}
    assert capacity(DECODER, CoreMLSettings().context) == 512 and capacity(DECODER, 40) == 40


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"lengths": "width=8"}, "lengths: names width, expected batch or height"),
        ({"lengths": "height=12"}, "lengths: has height=12:12:12, expected 0 to 128, multiples of 8"),
        ({"lengths": "batch=1:2:65"}, "lengths: has batch=1:2:65, expected 1 to 64"),
        ({"lengths": "batch=3:2:1"}, "expected 0 < MIN <= OPT <= MAX"),
        ({"lengths": "batch=1:2"}, "expected NAME=LENGTH or NAME=MIN:OPT:MAX"),
        ({"shapes": "any"}, "shapes: Input should be 'range', 'fixed' or 'enumerated'"),
        ({"precision": "bfloat16"}, "precision: Input should be"),
        ({"colour": "red"}, "colour: .*known: context, lengths, precision, shapes"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, str], what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        lengths_of(PICTURE, CoreMLSettings.parse(settings))


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match="context: is 513, and the model has 512"):
        capacity(DECODER, 513)


def feature(shape: tuple[int, ...], ranges: Any = None, sets: Any = None) -> Any:
    flexible = "shapeRange" if ranges else "enumeratedShapes" if sets else None
    array = SimpleNamespace(
        shape=shape,
        WhichOneof=lambda name: flexible,
        shapeRange=SimpleNamespace(
            sizeRanges=[SimpleNamespace(lowerBound=low, upperBound=high) for low, high in ranges or ()]
        ),
        enumeratedShapes=SimpleNamespace(shapes=[SimpleNamespace(shape=one) for one in sets or ()]),
    )
    return SimpleNamespace(type=SimpleNamespace(multiArrayType=array))


def test_which_shapes_are_taken() -> None:
    fixed, ranged, listed = (
        Taken(feature((1, 8))),
        Taken(feature((1, 8), ranges=[(1, 1), (2, 9)])),
        Taken(feature((1, 8), sets=[(1, 1), (1, 8)])),
    )
    assert (
        (1, 8) in fixed
        and (1, 9) not in fixed
        and (1, 9) in ranged
        and (1, 1) not in ranged
        and (1, 9, 1) not in ranged
    )
    assert (1, 1) in listed and (1, 2) not in listed
    assert [str(taken) for taken in (fixed, ranged, listed)] == ["(1, 8)", "(1, 2 to 9)", "(1, 1) or (1, 8)"]
    assert [taken.longest(1, 5) for taken in (fixed, ranged, listed)] == [0, 5, 1]
    assert [taken.longest(1, 100) for taken in (fixed, ranged, listed)] == [8, 9, 8]
    assert ranged.longest(1, 1) == 0
