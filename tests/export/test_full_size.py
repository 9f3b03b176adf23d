"""Models of their published sizes: graphs from config files alone, and int4 bundles from random weights. What they need
of memory, that they have the published number of weights, and that they run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import pytest

from profiles.memory import Measured, measure
from tests.export.full_size import MODELS

pytestmark = pytest.mark.full

MOST_BYTES: Final = 1.5e9
"""Anonymous memory that making the graphs of any model may take."""


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


def built(source: Path, *options: str) -> Measured:
    command = [sys.executable, "-m", "export", "build", str(source), *options]
    measured = measure(command, lambda stretch: None)
    assert measured.exit_code == 0
    return measured
