"""Everything derived from a signature agrees with it, whatever its dims are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.bundle.signature import BATCH, Dim, Port, Signature, State, Tensor, nbytes
from runtime.errors import InvalidInput

SEQUENCE = Dim(name="sequence", min=1, opt=4, max=64)
PAST = Dim(name="past", min=0, opt=8, max=64)
TOTAL = Dim(name="total", min=1, opt=9, max=64, sum_of=("past", "sequence"))
HEIGHT = Dim(name="height", min=8, opt=16, max=64, multiple=8)


def cache(name: str, length: Dim) -> Tensor:
    return Tensor(name=name, dtype="float32", dims=(BATCH, 2, length, 4))


DECODER = Signature(
    inputs=(
        Tensor(name="ids", dtype="int64", dims=(BATCH, SEQUENCE), values="below", limit=10),
        Tensor(name="mask", dtype="int64", dims=(BATCH, TOTAL), values="ones"),
        Tensor(name="positions", dtype="int64", dims=(BATCH, SEQUENCE), values="positions"),
    ),
    outputs=(Tensor(name="logits", dtype="float32", dims=(BATCH, 1, 10)),),
    states=(State(past=cache("past", PAST), present=cache("present", TOTAL), axis=2),),
    port=Port(embeddings="ids", mask="mask", positions="positions"),
)
IMAGE = Signature(
    inputs=(
        Tensor(name="image", dtype="float32", dims=(BATCH, 3, HEIGHT, HEIGHT.model_copy(update={"name": "width"}))),
    ),
    outputs=(),
)


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    """Inputs of one to three dims, some of them varying, over a handful of named dims."""
    dims = []
    for i in range(draw(st.integers(1, 4))):
        multiple = draw(st.sampled_from([1, 2, 8]))
        low = multiple * draw(st.integers(0, 3))
        dims.append(Dim(name=f"dim{i}", min=low, opt=low + 4 * multiple, max=low + 40 * multiple, multiple=multiple))
    axes = st.lists(st.one_of(st.integers(1, 5), st.sampled_from(dims)), min_size=1, max_size=3)
    dtypes = st.sampled_from(["float32", "float16", "int64", "int32", "bool"])
    tensors = [
        Tensor(name=f"input{i}", dtype=draw(dtypes), dims=tuple(draw(axes))) for i in range(draw(st.integers(1, 4)))
    ]
    return Signature(inputs=tuple(tensors), outputs=())


@given(signatures(), st.integers(0, 3))
def test_a_sample_fits_its_signature(signature: Signature, seed: int) -> None:
    lengths = signature.sample_lengths()
    assert lengths.keys() == signature.dims.keys()
    assert len(set(lengths.values())) == len(lengths)
    sample = signature.sample(lengths, seed)
    assert signature.bind(sample) == lengths
    again = signature.sample(lengths, seed)
    assert all(np.array_equal(sample[name], again[name]) for name in sample)


@given(signatures())
def test_samples_are_above_the_least_length(signature: Signature) -> None:
    assert all(length > signature.dims[name].min for name, length in signature.sample_lengths().items())


@pytest.mark.parametrize(("length", "over", "expected"), [(9, 2, 5), (8, 2, 4), (9, 4, 3), (9, 8, 2), (1, 8, 1)])
def test_lengths_are_divided_as_strided_convolutions_do(length: int, over: int, expected: int) -> None:
    dim = Dim(name="inner", min=1, opt=1, max=64, sum_of=("height",), over=over)
    assert dim.follows({"height": length}) == expected


@given(signatures())
def test_a_signature_survives_the_manifest(signature: Signature) -> None:
    assert Signature.model_validate_json(signature.model_dump_json()) == signature


def test_a_decoder_sample_is_a_real_call() -> None:
    lengths = DECODER.sample_lengths()
    assert lengths["total"] == lengths["past"] + lengths["sequence"]
    sample = DECODER.sample(lengths)
    assert sample["mask"].all() and sample["ids"].max() < 10
    assert sample["positions"][0].tolist() == list(range(lengths["past"], lengths["total"]))
    assert sample["past"].shape == (lengths["batch"], 2, lengths["past"], 4)


def test_states_are_hidden_from_callers() -> None:
    assert [tensor.name for tensor in DECODER.graph_inputs] == ["ids", "mask", "positions", "past"]
    assert [tensor.name for tensor in DECODER.graph_outputs] == ["logits", "present"]
    with pytest.raises(InvalidInput, match="past: is not an input"):
        DECODER.bind(DECODER.sample(DECODER.sample_lengths()))


def call(**changes: Any) -> dict[str, Any]:
    arrays = {
        "ids": np.zeros((2, 3), np.int64),
        "mask": np.ones((2, 7), np.int64),
        "positions": np.zeros((2, 3), np.int64),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_bind_gives_the_lengths() -> None:
    assert DECODER.bind(call()) == {"batch": 2, "sequence": 3, "total": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "^mask: is missing"),
        ({"mask": np.ones((2, 7), np.int32)}, "^mask: has dtype int32, expected int64"),
        ({"mask": np.ones(7, np.int64)}, "^mask: has 1 dims, expected 2"),
        ({"mask": np.ones((3, 7), np.int64)}, "^mask: batch is 3 here and 2 elsewhere"),
        ({"positions": np.zeros((2, 4), np.int64)}, "^positions: sequence is 4 here and 3 elsewhere"),
        ({"mask": np.ones((2, 65), np.int64)}, "^mask: total is 65, expected 1 to 64"),
        ({"ids": np.zeros((2, 0), np.int64)}, "^ids: sequence is 0, expected 1 to 64"),
        ({"mosk": np.ones(1)}, "^mosk: is not an input"),
    ],
)
def test_bind_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        DECODER.bind(call(**changes))


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 72, 16), (1, 4, 16, 16)])
def test_bind_checks_multiples_and_fixed_dims(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"^image: "):
        IMAGE.bind({"image": np.zeros(shape, np.float32)})


def test_nbytes() -> None:
    assert nbytes(DECODER.inputs, {"batch": 2, "sequence": 3, "total": 7}) == 8 * (6 + 14 + 6)


def test_a_call_is_cut_at_its_new_positions() -> None:
    inputs = {"ids": np.arange(4)[None], "mask": np.arange(6)[None], "positions": np.arange(2, 6)[None]}
    found = DECODER.cut(inputs, 1, 3)
    assert found["ids"].tolist() == [[1, 2]] and found["positions"].tolist() == [[3, 4]]
    assert found["mask"].tolist() == [[0, 1, 2, 3, 4]], "two before the call, and three of it"
    assert DECODER.lengths(found) == {"batch": 1, "sequence": 2, "total": 5}


def test_outputs_of_consecutive_calls_are_joined() -> None:
    steps = [{"logits": np.full((2, count, 10), count, np.float32)} for count in (1, 3)]
    assert DECODER.joined(steps)["logits"][0, :, 0].tolist() == [1, 3, 3, 3]


def renamed(signature: Signature, **names: str) -> dict[str, Any]:
    """The signature as data, without its port and with other names."""
    text = signature.model_dump_json(exclude={"port"})
    for old, new in names.items():
        text = text.replace(f'"name":"{old}"', f'"name":"{new}"')
    return dict(json.loads(text))


def test_signatures_of_older_bundles_have_the_names_of_transformers() -> None:
    data = renamed(DECODER, ids="inputs_embeds", mask="attention_mask", positions="position_ids")
    found = Signature.model_validate_json(json.dumps(data))
    assert found.port == found.decoder == Port()
    assert Signature.model_validate_json(found.model_dump_json()) == found
    assert IMAGE.port is None


def test_a_port_names_what_is_there() -> None:
    with pytest.raises(ValidationError, match="its port names position_ids, which it has no tensor or dim of"):
        Signature.model_validate(renamed(DECODER, ids="inputs_embeds", mask="attention_mask"))


def test_lengths_of_a_call() -> None:
    assert DECODER.decoder.lengths(5, 2) == {"batch": 1, "sequence": 2, "past": 5, "total": 7}
    assert DECODER.longest == 64


@given(
    step=st.sampled_from([1, 2, 8]),
    scale=st.sampled_from([1, 2, 4, 8]),
    ends=st.tuples(st.integers(1, 5), st.integers(0, 30)),
    places=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_lengths_that_follow_from_others(step: int, scale: int, ends: tuple[int, int], places: tuple[int, int]) -> None:
    """A VAE's picture and latents, in both directions: each length of the one fits the other's dim, and back again."""
    least, most = step * ends[0], step * sum(ends)

    def tensor(name: str, scale: int) -> Tensor:
        def edge(axis: str) -> Dim:
            low, high = least * scale, most * scale
            return Dim(name=f"{name}.{axis}", min=low, opt=low, max=high, multiple=step * scale)

        return Tensor(name=name, dtype="float32", dims=(BATCH, 3, edge("height"), edge("width")))

    latents, image = tensor("latents", 1), tensor("image", scale)
    decode = Signature(inputs=(latents,), outputs=(image.following(latents, times=scale),))
    encode = Signature(inputs=(image,), outputs=(latents.following(image, over=scale),))
    chosen = [min(least + step * place, most) for place in places]
    given = {"batch": 1, "latents.height": chosen[0], "latents.width": chosen[1]}
    found = decode.complete(given)
    assert image.shape(found) == (1, 3, chosen[0] * scale, chosen[1] * scale)
    decode.bind({"latents": np.empty(latents.shape(found), np.float32)})
    encode.bind({"image": np.empty(image.shape(found), np.float32)})
    back = encode.complete({name: length for name, length in found.items() if name not in latents_of(given)})
    assert back == found
    for signature in (decode, encode):
        assert Signature.model_validate_json(signature.model_dump_json()) == signature
        assert signature.complete({}) == {}, "what is not known leaves nothing to follow from it"


def latents_of(lengths: Mapping[str, int]) -> list[str]:
    return [name for name in lengths if name.startswith("latents.")]


@pytest.mark.parametrize(
    ("change", "source"),
    [
        ({"sum_of": ("depth",)}, "depth"),
        ({"sum_of": ("half",)}, "half"),
    ],
)
def test_dims_follow_from_free_dims(change: dict[str, Any], source: str) -> None:
    half = HEIGHT.model_copy(update={"name": "half", "sum_of": ("height",), "over": 2})
    other = HEIGHT.model_copy(update={"name": "other"} | change)
    with pytest.raises(ValidationError, match=f"its dim other follows from {source}, expected a dim of its inputs"):
        Signature(
            inputs=(Tensor(name="image", dtype="float32", dims=(HEIGHT,)),),
            outputs=(Tensor(name="y", dtype="float32", dims=(half, other)),),
        )


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Signature.model_validate(IMAGE.model_dump() | {"new": 1})
