"""Exams: found by the checkpoint, whatever its folder is called."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from calibration.requests import exams
from calibration.requests.exams import GROUP, exam_of, find
from runtime.errors import MissingDependency, NotFound


def test_an_exam_belongs_to_a_fingerprint() -> None:
    for exam in exams.exams():
        assert exam_of(exam.fingerprint) is exam and find([exam.fingerprint], None) is exam
    assert exam_of("0" * 64) is None


def test_models_without_a_common_exam(tmp_path: Path) -> None:
    fingerprints = [exam.fingerprint for exam in exams.exams()]
    for some, source in (([*fingerprints], None), (["0" * 64], None), ([], tmp_path), (fingerprints[:1], tmp_path)):
        with pytest.raises(NotFound, match="no exam in common"):
            find(some, source)


def test_a_package_that_is_left_out_has_no_exams() -> None:
    assert exams._loaded(EntryPoint("x", "a_package_that_is_left_out.exams:Exam", GROUP)) is None


def test_a_package_that_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import something_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="something_that_is_missing"):
        exams._loaded(EntryPoint("x", "half_there:Exam", GROUP))
