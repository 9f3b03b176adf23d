"""Models of their published sizes: graphs from config files alone, and int4 bundles from random weights. What they need
of memory, that they have the published number of weights, and that they run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image

from profiles.memory import Measured, measure
from tests.export.full_size import MODELS, fill

pytestmark = pytest.mark.full

MOST_BYTES: Final = 1.5e9
"""Anonymous memory that making the graphs of any model may take."""

BUILT: Final = {
    "llava-1.5-7b": 4e9,
    "llava-next-mistral-7b": 4e9,
    "bakllava-7b": 4e9,
    "blip2-opt-2.7b": 3e9,
    "instructblip-flan-t5-xl": 3e9,
}
"""Models that are built whole, and the anonymous memory that an int4 bundle of each may take."""


@pytest.mark.parametrize("name", MODELS)
def test_graphs_take_little_memory(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, source = MODELS[name], tmp_path / name
    model.make(source, request)
    measured = built(source, "--graph-only", "--output", str(tmp_path / "graphs"), *model.options(source))
    graphs = json.loads((tmp_path / "graphs" / "graphs.json").read_bytes())
    weights = sum(graph["weights"] for graph in graphs)
    print(f"{name}: {weights / 1e9:.3f} billion weights, {measured.whole}")
    assert weights == pytest.approx(model.weights, rel=0.02)
    assert measured.whole.anonymous <= MOST_BYTES


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BUILT)
def test_int4_bundles_take_little_memory_and_answer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, bundle, picture = tmp_path / name, tmp_path / "bundle", tmp_path / "picture.png"
    MODELS[name].make(source, request)
    stored, free = fill(source), shutil.disk_usage(tmp_path).free
    if free < stored:
        pytest.skip(f"an int4 bundle of {stored / 1e9:.0f} GB of weights needs half as much, {free / 1e9:.0f} are free")
    measured = built(source, *"--quant int4 --quality none --target openvino --output".split(), str(bundle))
    print(f"{name}: {measured.whole}")
    assert measured.whole.anonymous <= BUILT[name]
    shutil.rmtree(source)
    Image.fromarray(np.full((336, 336, 3), 128, np.uint8)).save(picture)
    asked = [sys.executable, "-m", "serving.cli.commands", "chat", "--bundle", f"m={bundle}"]
    answered = measure(
        [*asked, "--image", str(picture), "--prompt", "what is it?", "--max-tokens", "4"], lambda stretch: None
    )
    print(f"{name}: loaded and answered, {answered.whole}")
    assert answered.exit_code == 0


def built(source: Path, *options: str) -> Measured:
    command = [sys.executable, "-m", "export", "build", str(source), *options]
    measured = measure(command, lambda stretch: None)
    assert measured.exit_code == 0
    return measured
