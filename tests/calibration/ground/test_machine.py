"""What is said of the machine beside figures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from calibration.ground import machine
from runtime.placing.processor import processor


def test_how_busy_others_are() -> None:
    others = machine.Others()
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        pass
    share = others.share()
    assert (share is not None and 0 <= share <= 1) if Path("/proc/stat").is_file() else share is None


def test_others_are_what_is_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 seconds of processors' time, 12 were spent, 5 of them by this process."""
    moments = iter([(100.0, 30.0, 200.0), (112.0, 35.0, 220.0)])
    monkeypatch.setattr(machine.Others, "_now", staticmethod(lambda: next(moments)))
    assert machine.Others().share() == pytest.approx(7 / 20)


def test_machine() -> None:
    assert processor() and machine.threads() >= 1
    assert machine.slug().endswith(f"{machine.threads()}-threads") and " " not in machine.slug()
    assert machine.versions()["numpy"] and "no-such-package" not in machine.versions("no-such-package")
    assert machine.read_bandwidth(1 << 22, 1) > 1e8
