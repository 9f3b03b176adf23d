"""What a server adds and saves is measured on a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from profiles.serving import turns

pytestmark = pytest.mark.full


def test_turns_of_a_sample(vlm_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns.main(vlm_bundle, "onnxruntime", 1)
    found = dict(re.findall(r"^ *(.+): (-?[\d.e-]+) \(", capsys.readouterr().out, re.MULTILINE))
    assert len(found) == 7
    assert float(found["of the first turn's"]) < 1.5 and 0 <= float(found["from cancelling to idle"]) < 5
