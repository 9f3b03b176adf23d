"""What a build prints while a step runs, also while that step keeps libraries from printing."""

from __future__ import annotations

import time
from contextlib import redirect_stdout
from io import StringIO

import pytest

import export.report.console
import export.report.progress
from export.report.console import Show
from export.report.progress import Progress, ProgressStep


def test_a_step_that_silences_libraries_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export.report.progress, "BEAT", 0.02)
    monkeypatch.setattr(export.report.console, "QUIET", 0.1)
    with Progress([ProgressStep("unet", "trace", 5)], Show()).step("unet", "trace"), redirect_stdout(StringIO()):
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("[ 1/1] unet             trace ") for line in lines)
    assert all(line.endswith(" ...") for line in lines[:-1]) and not lines[-1].endswith("...")
