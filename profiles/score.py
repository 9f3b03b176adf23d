"""The score of a model in its exam: how many of the held-out cases it does right.

Every subject, a bundle on a target or the source checkpoint in its own library, gets the same cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from rich.table import Table

from calibration.ground import machine
from calibration.requests.exams import Ability, Exam
from profiles.exam import ExamSettings, Subject
from profiles.rows import Row
from runtime.placing.fingerprint import here
from runtime.placing.processor import processor
from runtime.timing import Spread

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Percent right: of all cases, and of each part of a case, such as an attribute of a picture, among the cases that
    have the part.
    """

    right: float
    parts: dict[str, float]
    count: int
    seconds: float


def score(
    subject: Subject, exam: Exam | Ability, setting: ExamSettings, tick: Callable[[], None] = lambda: None
) -> Scores:
    """Run all cases; `tick` is called after each. Raises what the subject raises."""
    cases = exam.cases(setting.count, 0, True)
    start = time.perf_counter()
    results = _ticking(zip(subject.results(cases, setting), cases, strict=True), tick)
    judged = [case.judge(result) for result, case in results]
    seconds = time.perf_counter() - start
    names = dict.fromkeys(name for one in judged for name in one.parts)
    parts = {name: percent([one.parts[name] for one in judged if name in one.parts]) for name in names}
    return Scores(percent([one.right for one in judged]), parts, len(judged), seconds)


def percent(right: Sequence[bool]) -> float:
    """The share of what is true, in percent."""
    return 100 * sum(right) / len(right)


def _ticking(items: Iterable[T], tick: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        tick()


def rows(subject: Subject, setting: ExamSettings, scores: Scores, threads: int, ability: str = "") -> list[Row]:
    """The scores for storing: `right` for all attributes or questions, `right.PART` for each part."""
    settings: dict[str, int | float | str] = {"count": scores.count, "seconds": round(scores.seconds, 1)}
    settings |= setting.model_dump(exclude={"count", "batch"}, exclude_none=True) | (
        {"ability": ability} if ability else {}
    )
    return [
        Row(
            metric=metric,
            unit="%",
            spread=Spread.of([percent]),
            values=(percent,),
            program=subject.program,
            bundle="" if subject.target == "torch" else subject.name,
            source=subject.name,
            quant=subject.quant,
            target=subject.target,
            device=subject.device,
            cpu=processor(),
            threads=threads or machine.threads(),
            settings=settings,
            versions=machine.versions("torch", "diffusers", "transformers")
            if subject.target == "torch"
            else machine.versions(),
            date=datetime.now(UTC),
            fingerprint=here(),
        )
        for metric, percent in {
            "right": scores.right,
            **{f"right.{part}": value for part, value in scores.parts.items()},
        }.items()
    ]


def table(results: Sequence[tuple[Subject, Scores]]) -> Table:
    """A line for each subject; the drop is in points below the first one without quantization."""
    base = next((scores.right for subject, scores in results if subject.quant == "none"), None)
    parts = list(dict.fromkeys(part for _, scores in results for part in scores.parts))
    shown = Table("model", "quant", "target", "right", "drop", *parts, "cases", "seconds")
    for subject, scores in results:
        drop = "" if base is None or subject is results[0][0] else f"{base - scores.right:+.1f}"
        percents = [f"{scores.parts[part]:.1f}" if part in scores.parts else "-" for part in parts]
        shown.add_row(
            subject.name,
            subject.quant,
            subject.target,
            f"{scores.right:.1f} %",
            drop,
            *percents,
            str(scores.count),
            f"{scores.seconds:.0f}",
        )
    return shown
