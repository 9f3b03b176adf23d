"""Calibration sets on disk: nothing lost, nothing left to chance, and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save_file

from calibration.capture.sets import ENOUGH, METADATA, CalibrationSet
from runtime.errors import InvalidInput, NotFound, ResourceExhausted, SourceError

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ARRAYS = st.sampled_from(["float32", "float16", "int64", "int32", "bool"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
SAMPLES = st.dictionaries(
    NAMES.filter(lambda name: "/" not in name),
    st.lists(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=3), max_size=3),
    max_size=3,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def example(**changes: Any) -> CalibrationSet:
    samples = {
        "unet": [
            {"sample": np.full((1, 4), step, np.float32), "timestep": np.array([step], np.float32)} for step in range(3)
        ]
    }
    facts: dict[str, Any] = {"requests": ENOUGH, "skipped": [], "positions": {"unet": [1, 1, 1]}}
    return CalibrationSet(
        **({"kind": "diffusion", "fingerprint": "a" * 64, "settings": facts, "samples": samples} | changes)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    kind=st.sampled_from(["diffusion", "chat"]),
    fingerprint=NAMES,
    facts=st.dictionaries(NAMES, JSON, max_size=3),
    samples=SAMPLES,
)
def test_what_is_saved_is_loaded(
    tmp_path: Path, kind: Any, fingerprint: str, facts: dict[str, Any], samples: Any
) -> None:
    file, again = tmp_path / "set.safetensors", tmp_path / "again.safetensors"
    CalibrationSet(kind, fingerprint, facts, samples).save(file)
    loaded = CalibrationSet.load(file)
    assert (loaded.kind, loaded.fingerprint, loaded.settings) == (kind, fingerprint, facts)
    assert loaded.samples.keys() == samples.keys()
    for submodel, calls in samples.items():
        assert [call.keys() for call in loaded.samples[submodel]] == [call.keys() for call in calls]
        for found, call in zip(loaded.samples[submodel], calls, strict=True):
            for name, array in call.items():
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert found[name].tobytes() == array.tobytes()
    loaded.save(again)
    assert again.read_bytes() == file.read_bytes()


def test_order_does_not_matter(tmp_path: Path) -> None:
    calls = [{"b": np.zeros(2, np.float32), "a": np.ones(3, np.int64)}, {"c": np.ones((2, 3), np.float16).T}]
    example(samples={"x": calls, "y": calls}, settings={"seed": 0, "requests": 8}).save(tmp_path / "one")
    turned = [dict(reversed(call.items())) for call in calls]
    example(samples={"y": turned, "x": turned}, settings={"requests": 8, "seed": 0}).save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert np.array_equal(CalibrationSet.load(tmp_path / "one").samples["x"][1]["c"], np.ones((3, 2)))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "set.safetensors"
    example().save(file)
    before = file.read_bytes()

    def full(_tensors: Any, path: Path, _metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calibration.capture.sets.save_file", full)
    with pytest.raises(ResourceExhausted, match=r"No space left on device. Please free some space"):
        example(fingerprint="b").save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceExhausted, match="cannot write the calibration set"):
        example().save(tmp_path / "file" / "set.safetensors")
    with pytest.raises(InvalidInput, match="is a folder, expected the name of a file"):
        example().save(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist: expected a file that `enginecast calibrate` wrote"):
        CalibrationSet.load(tmp_path / "none")
    with pytest.raises(NotFound, match="is no file"):
        CalibrationSet.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x89PNG\r\n\x1a\n" + b"0" * 64, b"\xff" * 100],
    ids=["empty", "json", "png", "long header"],
)
def test_what_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(SourceError, match="cannot be read as safetensors"):
        CalibrationSet.load(tmp_path / "set")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    example().save(tmp_path / "set")
    content = (tmp_path / "set").read_bytes()
    (tmp_path / "set").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceError, match="cannot be read as safetensors"):
        CalibrationSet.load(tmp_path / "set")


def test_weights_are_no_set(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "set", metadata)
        with pytest.raises(InvalidInput, match=f"without '{METADATA}' in its header, so it is no calibration set"):
            CalibrationSet.load(tmp_path / "set")


HEADER: dict[str, Any] = {"version": 1, "kind": "chat", "fingerprint": "f", "settings": {}, "counts": {"decoder": 2}}


@pytest.mark.parametrize(
    ("header", "names", "error", "message"),
    [
        (HEADER | {"version": 2}, [], InvalidInput, "has format version 2, this program reads 1: capture it again"),
        ([], [], InvalidInput, "has format version None"),
        ("{", [], SourceError, "damaged header"),
        ("[" * 100_000, [], SourceError, "damaged header"),
        (HEADER | {"kind": "no kind"}, [], SourceError, "damaged header: .*kind"),
        (HEADER | {"counts": {"decoder": "many"}}, [], SourceError, "damaged header: .*counts"),
        (HEADER | {"counts": {"decoder": -1}}, ["decoder/0000/x"], SourceError, "damaged header: .*counts"),
        (
            HEADER | {"counts": {"decoder": 10**15}},
            [],
            SourceError,
            "announces 1000000000000000 calls but has 0 tensors",
        ),
        (HEADER, ["decoder/0000/x", "decoder/0000/y"], SourceError, "has no tensors of call 1 of decoder"),
        (
            HEADER,
            ["decoder/0000/x", "decoder/0002/x"],
            SourceError,
            "tensor 'decoder/0002/x' that its header does not announce",
        ),
        (HEADER, ["decoder/0000/x", "decoder/-001/x"], SourceError, "tensor 'decoder/-001/x' that"),
        (HEADER, ["decoder/0000/x", "decoder/1/x"], SourceError, "tensor 'decoder/1/x' that"),
        (HEADER, ["decoder/0000/x", "unet/0001/x"], SourceError, "tensor 'unet/0001/x' that"),
        (HEADER, ["decoder/0000/x", "decoder"], SourceError, "tensor 'decoder' that"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, names: list[str], error: type[Exception], message: str) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "set", {METADATA: text})
    with pytest.raises(error, match=message):
        CalibrationSet.load(tmp_path / "set")


def test_sets_of_another_model_are_refused() -> None:
    found = example(fingerprint="a" * 64)
    found.check("a" * 64, "mine")
    with pytest.raises(
        InvalidInput, match=r"calibration: was captured from the checkpoint a{16}, but mine is b{16}: capture a set"
    ):
        found.check("b" * 64, "mine")


def test_a_good_set_warns_of_nothing() -> None:
    assert example().warnings() == []


def test_what_a_small_set_lacks() -> None:
    facts = {"requests": 2, "skipped": [f"{i}.png: is damaged" for i in range(5)], "positions": {"unet": [1, 0, 1, 0]}}
    few, skipped, uncalled, levels = example(settings=facts, samples={"unet": [{}], "vae_encoder": []}).warnings()
    assert few == "2 requests are few: ranges seen in fewer than 8 may be exceeded by others"
    assert skipped == "5 requests were skipped: 0.png: is damaged; 1.png: is damaged; 2.png: is damaged and 2 more"
    assert uncalled == "vae_encoder was never called: its activations cannot be calibrated with this set"
    assert levels == "noise levels are not covered: no input of unet at step 2, 4 of 4"
    assert len(example(kind="chat", settings=facts | {"requests": 8, "skipped": []}).warnings()) == 0, (
        "positions of a chat are no noise levels"
    )
