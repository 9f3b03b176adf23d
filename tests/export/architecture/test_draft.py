"""Drafts that a build adds to language models: what is read of a file, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.errors import EnginecastError, InvalidInput

WIDTH = 32
"""Of the hidden states of `tiny_vlm`."""


def matrices(hidden: int = WIDTH, inner: int = 24, rows: int = 3 * WIDTH) -> dict[str, NDArray[np.float16]]:
    return {"up.weight": np.ones((inner, 2 * hidden), np.float16), "down.weight": np.ones((rows, inner), np.float16)}


def opened(source: Path, folder: Path, *drafts: Mapping[str, NDArray[np.float16]]) -> Build:
    """A build with drafts of these tensors."""
    for number, tensors in enumerate(drafts):
        save_file(dict(tensors), folder / f"draft-{number}.safetensors")
    added = tuple(Addition("draft", folder / f"draft-{number}.safetensors") for number in range(len(drafts)))
    return Build.open(Options(str(source), folder / "bundle", additions=added))


def test_a_draft_is_a_submodel_behind_the_decoder(tiny_vlm: Path, tmp_path: Path) -> None:
    build = opened(tiny_vlm, tmp_path, matrices())
    parts = {part.name: part for part in build.parts}
    assert [*parts] == ["vision_encoder", "token_embedding", "decoder", "draft"]
    assert [one.name for one in parts["decoder"].signature.outputs] == ["logits", "hidden_states"]
    (logits,) = parts["draft"].signature.outputs
    assert logits.dims[1:] == (3, 512) and build.family.config(build.source)["draft"]
    assert build.size(parts["draft"]) == 2 * (24 * 2 * WIDTH + 3 * WIDTH * 24 + 512 * WIDTH)
    plain = Build.open(Options(str(tiny_vlm), tmp_path / "bundle"))
    assert [part.name for part in plain.parts] == ["vision_encoder", "token_embedding", "decoder"]
    assert [one.name for one in plain.parts[-1].signature.outputs] == ["logits"]
    assert plain.fingerprint != build.fingerprint and not plain.family.config(plain.source)["draft"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (matrices(hidden=48), r"up.weight is \(24, 96\), expected \(24, 64\): this draft was made for another base"),
        (matrices(rows=3 * WIDTH + 1), r"down.weight is \(97, 24\), expected \(96, 24\)"),
        (matrices(rows=WIDTH - 1), r"down.weight is \(31, 24\), expected \(32, 24\)"),
        ({**matrices(), "bias": np.ones(3, np.float16)}, r"bias is \(3,\), expected None"),
        (
            {"up.weight": np.ones((24, 64), np.float16)},
            r"is no draft: expected up.weight \[inner, 64\] and down.weight",
        ),
        ({name: one.ravel() for name, one in matrices().items()}, "is no draft"),
    ],
)
def test_the_draft_of_another_model_is_refused(
    tiny_vlm: Path, tmp_path: Path, tensors: Mapping[str, NDArray[np.float16]], message: str
) -> None:
    with pytest.raises(EnginecastError, match=message):
        opened(tiny_vlm, tmp_path, tensors)


def test_one_draft_of_a_file_is_taken(tiny_vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="draft: is given 2 times, expected one"):
        opened(tiny_vlm, tmp_path, matrices(), matrices())
    added = (Addition("draft", tmp_path),)
    with pytest.raises(EnginecastError, match=r"is a folder, expected the \.safetensors file of a draft"):
        Build.open(Options(str(tiny_vlm), tmp_path / "bundle", additions=added))


def test_a_family_without_drafts_says_so(tiny_blip2: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="draft: does not apply to a Blip2ForConditionalGeneration"):
        opened(tiny_blip2, tmp_path, matrices())
