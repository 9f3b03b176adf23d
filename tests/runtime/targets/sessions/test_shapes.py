"""Lengths that are fixed: how they are written, which one a call fits, how a longer call is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import EngineError, InvalidInput
from runtime.targets.sessions.shapes import cuts, fitting, parse_shapes, shapes_of, written

HEIGHT = Dim(name="height", min=2, opt=64, max=128, multiple=2)
SIGNATURE = Signature(inputs=(Tensor(name="sample", dtype="float32", dims=(BATCH, 4, HEIGHT)),), outputs=())
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


@given(st.lists(st.dictionaries(NAMES, st.integers(1, 9999), min_size=1, max_size=4), min_size=1, max_size=4))
def test_shapes_are_read_as_they_are_written(shapes: list[dict[str, int]]) -> None:
    assert list(parse_shapes(";".join(map(written, shapes)))) == shapes
    assert (
        list(parse_shapes(" ; ".join(written(shape).replace("=", " = ").replace(",", " , ") for shape in shapes)))
        == shapes
    )


@pytest.mark.parametrize(
    "text",
    ["", "height", "height=", "=4", "height=0", "height=-4", "height=4.5", "height=4;", "height=4:8", "a=1,,b=2"],
)
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME=LENGTH"):
        parse_shapes(text)


def test_one_shape_has_one_length_for_a_name() -> None:
    with pytest.raises(ValueError, match="two lengths for height"):
        parse_shapes("height=4,height=8")


def test_a_submodel_takes_what_is_about_it() -> None:
    shapes = parse_shapes("batch=2,height=64,image_height=512;height=64,width=8;image_height=256")
    assert shapes_of(shapes, SIGNATURE) == ({"batch": 2, "height": 64}, {"height": 64})
    assert shapes_of(parse_shapes("height=64,width=64;height=64,width=96"), SIGNATURE) == ({"height": 64},)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heigth=64", "'heigth', which is no dim: did you mean 'height'"),
        ("height=256", "height=256, and the model takes 2 to 128, a multiple of 2"),
        ("height=63", "a multiple of 2"),
        ("batch=65", "takes 1 to 64"),
    ],
)
def test_what_the_model_does_not_take(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"shapes: has .*{message}"):
        shapes_of(parse_shapes(text), SIGNATURE)


def test_the_shape_that_fixes_most_is_taken() -> None:
    shapes = ({"height": 64}, {"height": 64, "width": 96}, {"height": 96})
    assert fitting(shapes, {"height": 64, "width": 96, "batch": 3}) == shapes[1]
    assert fitting(shapes, {"height": 64, "width": 64, "batch": 3}) == shapes[0]
    with pytest.raises(
        EngineError, match=r"height=32,width=64 is no shape .* expected height=64 or height=64,width=96 or height=96"
    ):
        fitting(shapes, {"height": 32, "width": 64, "batch": 1})


@given(length=st.integers(1, 600), others=st.sets(st.integers(2, 256), max_size=3))
def test_calls_are_cut_without_gaps(length: int, others: set[int]) -> None:
    sizes = {1, *others}
    pieces = cuts(length, sizes)
    done = 0
    for start, stop in pieces:
        assert 0 <= start <= done < stop <= length and stop - start in sizes
        done = stop
    assert done == length
    largest = max(size for size in sizes if size <= length)
    if length >= max(sizes):
        assert len(pieces) == -(-length // largest), "no more pieces than the largest needs"


def test_examples_of_cuts() -> None:
    assert cuts(1, [1, 32]) == [(0, 1)]
    assert cuts(32, [1, 32]) == [(0, 32)]
    assert cuts(37, [1, 32]) == [(0, 32), (5, 37)], "the last begins among those that are done"
    assert cuts(3, [1, 32]) == [(0, 1), (1, 2), (2, 3)]
    assert cuts(33, [32]) == [(0, 32), (1, 33)]


def test_a_call_shorter_than_every_piece() -> None:
    with pytest.raises(EngineError, match="3 new positions fit none of the lengths it was compiled for: 8, 32"):
        cuts(3, [32, 8])
