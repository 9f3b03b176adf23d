"""How well a model does the sample task: pictures drawn right, or questions answered right, of held-out cases that a
program can check.

Every subject, a bundle on a target or the source checkpoint in plain diffusers or transformers, gets the same cases,
and pictures start from the same noise: that of `runtime.diffusion.latents.random_stream` with the case's number as
seed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

from rich.table import Table

from calibration.ground import machine
from profiles.rows import Row
from profiles.subjects import Exam, Subject
from runtime.placing.devices import processor
from runtime.timing import Spread
from samples.world.questions import test_questions
from samples.world.scenes import test_prompts
from samples.world.scoring import score_answer, score_picture

T = TypeVar("T")
ATTRIBUTES: Final = ("background", "missing", "extra", "size", "colour", "shape")
"""In what a picture can be wrong, as `samples.world.scoring` names it."""


@dataclass(frozen=True)
class Scores:
    """Percent right: of all cases, and by part, which is an attribute of pictures or a kind of question.

    Of an attribute, percent of the pictures that show it; one that no picture shows is left out.
    """

    right: float
    parts: dict[str, float]
    count: int
    seconds: float


def score(subject: Subject, exam: Exam, tick: Callable[[], None] = lambda: None) -> Scores:
    """Ask all cases; `tick` is called after each. Raises what the subject raises."""
    start = time.perf_counter()
    if subject.kind == "diffusion":
        scenes = test_prompts(exam.count)
        scores = [
            score_picture(picture, scene)
            for picture, scene in _ticking(zip(subject.pictures(scenes, exam), scenes, strict=True), tick)
        ]
        seconds = time.perf_counter() - start
        parts = {}
        for name in ATTRIBUTES:
            shown = [name not in one.wrong for one in scores if one.tells(name)]
            if shown:
                parts[name] = 100 * sum(shown) / len(shown)
        return Scores(100 * sum(map(bool, scores)) / len(scores), parts, len(scores), seconds)
    cases = test_questions(exam.count)
    right = [
        (case.kind, score_answer(said, case.answer))
        for said, case in _ticking(zip(subject.answers(cases, exam), cases, strict=True), tick)
    ]
    seconds = time.perf_counter() - start
    asked, known = Counter(kind for kind, _ in right), Counter(kind for kind, good in right if good)
    return Scores(
        100 * known.total() / len(right), {kind: 100 * known[kind] / asked[kind] for kind in asked}, len(right), seconds
    )


def _ticking(items: Iterable[T], tick: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        tick()


def rows(subject: Subject, exam: Exam, scores: Scores, threads: int) -> list[Row]:
    """The scores for storing: `right` for all attributes or questions, `right.PART` for each part."""
    asked: dict[str, int | float | str] = {"count": scores.count, "seconds": round(scores.seconds, 1)}
    if subject.kind == "diffusion":
        asked |= {"steps": exam.steps, "guidance_scale": exam.guidance_scale}
    return [
        Row(
            metric=metric,
            unit="%",
            spread=Spread.of([percent]),
            program=subject.program,
            bundle="" if subject.target == "torch" else subject.name,
            source=subject.name,
            quant=subject.quant,
            target=subject.target,
            device=subject.device,
            cpu=processor(),
            threads=threads or machine.threads(),
            settings=asked,
            versions=machine.versions("torch", "diffusers", "transformers")
            if subject.target == "torch"
            else machine.versions(),
            date=datetime.now(UTC),
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
