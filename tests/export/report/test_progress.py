"""Steps, and what is said of the time that they will take."""

from __future__ import annotations

import time

import pytest

import export.report.progress
from calibration.ground.progress import each, reused
from export.report.console import duration
from export.report.progress import Progress, ProgressStep, Report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(export.report.progress.time, "perf_counter", lambda: now[0])
    return now


def test_every_step_counts(clock: list[float]) -> None:
    reports: list[Report] = []
    progress = Progress(
        [ProgressStep("a", "trace", 10), ProgressStep("b", "trace", 20), ProgressStep("all", "quality", 60)],
        reports.append,
    )
    assert not reports
    for name in "ab":
        with progress.step(name, "trace") as notes:
            clock[0] += 1  # from the cache
            notes.append("cached")
    with progress.step("all", "quality"):
        pass
    begun = {report.step.submodel: report.eta for report in reports if report.seconds is None}
    assert begun == {"a": 90, "b": 20 * 0.1 + 60, "all": 60}, "quick traces say nothing of the comparison"
    assert [report.detail for report in reports if report.seconds is not None] == ["cached", "cached", ""] and reports[
        -1
    ].eta == 0


def test_a_running_step_shows_what_it_needs(clock: list[float]) -> None:
    reports: list[Report] = []
    progress = Progress([ProgressStep("all", "calibrate", 5), ProgressStep("all", "hash", 1)], reports.append)
    with progress.step("all", "calibrate"):
        for _ in each("request", range(10)):
            clock[0] += 60
    etas = {report.detail: report.eta for report in reports if report.seconds is None}
    assert [etas[f"request {n} of 10"] for n in (1, 2, 10)] == pytest.approx([6, 541, 61])


def test_a_step_that_says_nothing_is_never_nearly_done(clock: list[float]) -> None:
    reports: list[Report] = []
    progress = Progress([ProgressStep("unet", "compile", 5)], reports.append)
    with progress.step("unet", "compile"):
        clock[0] += 200
        progress._report()
    assert reports[1].eta == 100 and reports[1].elapsed == 200


def test_what_was_done_before_does_not_count(clock: list[float]) -> None:
    reports: list[Report] = []
    progress = Progress([ProgressStep("all", "capture", 100)], reports.append)
    with progress.step("all", "capture"):
        for number in each("request", range(10)):
            if number < 8:
                reused()
            else:
                clock[0] += 50
    assert reports[-2].detail == "request 10 of 10" and reports[-2].eta == pytest.approx(0.4 * 50 + 0.6 * 50)


def test_a_silent_step_is_reported_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.report.progress, "BEAT", 0.02)
    reports: list[Report] = []
    with Progress([ProgressStep("unet", "compile", 5)], reports.append).step("unet", "compile"):
        time.sleep(0.2)
    assert len(reports) > 4 and reports[-2].elapsed > 0.1 and reports[-1].seconds is not None


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 99, 100, 3600, 9000)] == ["0 s", "99 s", "2 min", "60 min", "2.5 h"]
