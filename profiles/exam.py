"""An exam of a checkpoint: who takes it, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from calibration.requests.exams import Case
from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import BATCH


class ExamSettings(Frozen):
    """How an exam is taken: `count` cases, of which `batch` run together where a model can do that. A task may add
    settings of its own.
    """

    count: int = Field(ge=1)
    batch: int = Field(default=16, ge=1, le=BATCH.max // 2)
    """Of pictures: with guidance each takes two rows of a batch."""


T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class Subject:
    """Who takes the exam: a bundle on a target, or a checkpoint, whose target is "torch". `results` gives the result of
    each case in order, as `Case.judge` takes it.
    """

    program: str
    name: str
    quant: str
    target: str
    device: str
    results: Callable[[Sequence[Case], Any], Iterable[Any]]
