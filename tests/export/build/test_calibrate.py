"""Capturing a set from a checkpoint: what is refused before any work, what is written, and that work is never done
twice.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export.build.options
from calibration.capture.sets import CalibrationSet
from calibration.observe.ranges import collect_ranges
from export.build.calibrate import Options, calibrate
from export.build.state import Build, part_graph
from export.report.progress import Report
from runtime.bundle.manifest import Bundle
from runtime.errors import EnginecastError, InvalidInput, NotFound, SourceError
from runtime.vision.images import encode_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures with captions and one that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(encode_image(np.full((20, 30, 3), i * 100, np.uint8)))
        (folder / f"{i}.txt").write_text("a small red circle in the center on a white background")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def kept(cache: Path) -> list[Path]:
    return list(cache.glob("calibrate-*"))


def test_a_set_of_a_model_that_chats(tiny_vlm: Path, tiny_bundle: Path, tmp_path: Path, own_cache: Path) -> None:
    reports: list[Report] = []
    output = tmp_path / "sets" / "tiny.safetensors"
    found = calibrate(Options(str(tiny_vlm), output, count=3), reports.append)
    loaded = CalibrationSet.load(output)
    assert loaded.fingerprint == found.fingerprint == Bundle(tiny_bundle).manifest.source.fingerprint
    assert (loaded.kind, loaded.settings["origin"], loaded.settings["requests"]) == ("chat", "built-in", 3)
    assert {name: len(calls) for name, calls in loaded.samples.items()} == {
        "vision_encoder": 3,
        "token_embedding": 24,
        "decoder": 3,
    }
    assert loaded.warnings() == ["3 requests are few: ranges seen in fewer than 8 may be exceeded by others"]
    capturing = [report.detail for report in reports if report.step.stage == "capture" and report.seconds is None]
    assert [detail for detail in dict.fromkeys(capturing) if "," not in detail] == [
        "",
        *(f"request {n} of 3" for n in (1, 2, 3)),
    ]
    assert any(re.fullmatch(r"request 3 of 3, token \d+ of at most \d+", detail) for detail in capturing)
    assert (
        {report.total for report in reports} == {reports[-1].number}
        and reports[-1].eta == 0
        and reports[-1].detail == "3 requests"
    )
    assert [report.number for report in reports if report.seconds is not None] == list(range(1, reports[-1].total + 1))
    assert not kept(own_cache), "what is done needs no going on"


def test_stopped_work_goes_on(tiny_vlm: Path, tmp_path: Path, own_cache: Path) -> None:
    unbroken, broken = tmp_path / "unbroken.safetensors", tmp_path / "broken.safetensors"
    calibrate(Options(str(tiny_vlm), unbroken, count=4))

    def stop(report: Report) -> None:
        if report.detail == "request 3 of 4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(Options(str(tiny_vlm), broken, count=4), stop)
    assert len(kept(own_cache)) == 1 and not broken.exists()

    reports: list[Report] = []
    calibrate(Options(str(tiny_vlm), broken, count=4), reports.append)
    assert reports[-1].detail == "4 requests, 2 kept from before"
    assert broken.read_bytes() == unbroken.read_bytes()
    assert not kept(own_cache)


def test_a_set_of_a_model_that_draws_can_be_calibrated_with(
    tiny_diffusion: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set.safetensors"
    found = calibrate(Options(str(tiny_diffusion), output, images=pictures))
    steps = found.settings["positions"]["unet"]
    assert len(steps) == 12 and sum(steps) == 16 and set(steps) == {1, 2}, (
        "two of three requests, each with its third of 24 calls"
    )
    few, skipped = found.warnings()
    assert few.startswith("2 requests are few") and skipped.startswith("1 requests were skipped: broken.jpg: ")
    assert set(found.samples) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}, "the encoder gets the pictures"
    state = Build.open(export.build.options.Options(str(tiny_diffusion), tmp_path / "bundle"))
    loaded = CalibrationSet.load(output)
    loaded.check(state.fingerprint, state.name)
    unet = next(part for part in state.parts if part.name == "unet")
    ranges = collect_ranges(part_graph(state, unet), ["sample", "noise_pred"], loaded.samples["unet"])
    assert 0 < ranges["sample"].peak <= max(float(np.abs(call["sample"]).max()) for call in loaded.samples["unet"])
    assert ranges["noise_pred"].peak > 0
    with pytest.raises(InvalidInput, match=r"calibration: was captured from the checkpoint \w{16}, but tiny is 0{16}"):
        loaded.check("0" * 64, "tiny")


def test_another_checkpoint_has_another_fingerprint(tiny_vlm: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_vlm, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2:] = b"\x00\x3c" if content[-2:] != b"\x00\x3c" else b"\x00\x00"
    weights.write_bytes(content)
    states = [Build.open(export.build.options.Options(str(source), tmp_path / "b")) for source in (tiny_vlm, other)]
    found = CalibrationSet("chat", states[0].fingerprint, {}, {})
    found.check(states[0].fingerprint, "tiny-vlm")
    with pytest.raises(InvalidInput, match="was captured from the checkpoint"):
        found.check(states[1].fingerprint, "other")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prompts": Path("a.txt"), "images": Path("b")},
            InvalidInput,
            "images: cannot be given together with prompts",
        ),
        ({"count": 0}, InvalidInput, "count: is 0, expected 1 or more requests"),
        ({"seed": -1}, InvalidInput, "seed: is -1, expected 0 or more"),
        ({"prompts": Path("none.txt")}, NotFound, "prompts: file none.txt does not exist"),
        ({"images": Path("none")}, NotFound, "images: folder none does not exist"),
        ({"questions": Path("none.jsonl")}, NotFound, "questions: file none.jsonl does not exist"),
        ({"source": "nowhere/at/all"}, EnginecastError, "nowhere/at/all"),
    ],
)
def test_mistakes_are_told_before_any_work(
    tiny_vlm: Path, tmp_path: Path, own_cache: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def listen(report: Report) -> None:
        raise AssertionError(f"{report.step} was begun")

    with pytest.raises(error, match=message):
        calibrate(Options(**({"source": str(tiny_vlm), "output": tmp_path / "set"} | options)), listen)
    assert not kept(own_cache) and not (tmp_path / "set").exists()


def test_questions_are_for_models_that_chat(tiny_diffusion: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "what?"}\n')
    with pytest.raises(InvalidInput, match="questions: are for models that chat"):
        calibrate(Options(str(tiny_diffusion), tmp_path / "set", questions=tmp_path / "q.jsonl"))


def test_only_sets_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    for path in (tmp_path / "letter", tmp_path):
        with pytest.raises(
            InvalidInput, match=r"exists and is no calibration set: choose another file|is a folder, expected a file"
        ):
            Options("source", path)
    CalibrationSet("chat", "f", {}, {}).save(tmp_path / "set")
    assert Options("source", tmp_path / "set").output == tmp_path / "set"


def test_damaged_weights_are_refused(tiny_vlm: Path, tmp_path: Path, own_cache: Path) -> None:
    source = shutil.copytree(tiny_vlm, tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SourceError):
        calibrate(Options(str(source), tmp_path / "set"))
    assert not (tmp_path / "set").exists() and not kept(own_cache)
