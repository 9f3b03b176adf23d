"""Requests that pipelines are run on to calibrate them, and the built-in ones: an exam's own, or those of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, TypeVar

from calibration.requests.exams import exam_of
from calibration.requests.task import task_requests
from runtime.errors import InvalidInput
from runtime.vision.images import Picture

REQUESTS: Final = 8
BRIEF_REQUESTS: Final = 3
"""Requests of a brief capture."""
MOST: Final = 128
"""Requests of the user's own that are run without a given count."""
TRIES: Final = 4
"""Built-in requests tried for each one wanted, but at least `LEAST_TRIES`: each general prompt twice."""
LEAST_TRIES: Final = 64
BUILT_IN: Final = "built-in"

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class NamedRequest:
    """A request and what the user knows it by. `picture`, uint8 RGB [height, width, 3], goes to the VAE encoder of a
    model that draws.
    """

    name: str
    request: Any
    picture: Picture | None = None


@dataclass
class Requests:
    """Where requests come from; to be read once. `origin` is built-in, prompts, images or questions, `size` how many
    there may be (None: without end), `file` the file's or folder's name, `usual` how many are run without a
    given count. `skipped` grows while the requests are read: what could not be used, and why.
    """

    task: str
    origin: str
    entries: Iterator[NamedRequest]
    size: int | None = None
    file: str = ""
    usual: int = MOST
    skipped: list[str] = field(default_factory=list)

    def wanted(self, count: int | None) -> int:
        """How many requests to run for a requested `count`; None is the usual number."""
        most = self.usual if count is None else count
        return most if self.size is None else min(most, self.size)


def built_in(task: str, seed: int = 0, fingerprint: str = "") -> Requests:
    """The requests that need no files: those of the exam of the checkpoint with this fingerprint, else general ones."""
    maker, exam = task_requests()[task], exam_of(fingerprint)
    every = enumerate(exam.calibration(seed) if exam else maker.general(seed))
    requests = (NamedRequest(f"{BUILT_IN} {i + 1}", maker.calibrating(request, i, seed)) for i, request in every)
    return Requests(task, BUILT_IN, requests, usual=REQUESTS)


def built_in_key(fingerprint: str) -> str:
    """Identifies the exam whose requests a checkpoint is calibrated with; empty for one without an exam."""
    exam = exam_of(fingerprint)
    return exam.key if exam else ""


def briefly(requests: Requests) -> Requests:
    """The same requests in few steps or tokens, and fewer of them unless a count is given: for models whose calls take
    many seconds each.
    """
    maker = task_requests()[requests.task]
    entries = (replace(one, request=maker.brief(one.request, i)) for i, one in enumerate(requests.entries))
    return replace(requests, entries=entries, usual=BRIEF_REQUESTS)


def skip(requests: Requests, name: str, error: InvalidInput) -> None:
    """Note that a request cannot be used, and why."""
    reason = str(error)
    requests.skipped.append(reason if reason.startswith(f"{name}: ") else f"{name}: {reason}")


def accepted(ready: Callable[[NamedRequest], T], requests: Requests, wanted: int) -> Iterator[tuple[NamedRequest, T]]:
    """The first `wanted` requests that a model can read, and what `ready` made of each.

    A prompt may be too long for a small model's tokenizer, or a picture too many for its context. Raises InvalidInput
    when there is none.
    """
    found = 0
    refusal: InvalidInput | None = None
    for entry in (
        requests.entries if requests.size is not None else islice(requests.entries, max(TRIES * wanted, LEAST_TRIES))
    ):
        try:
            made = ready(entry)
        except InvalidInput as error:
            refusal = error
            if requests.size is not None:
                skip(requests, entry.name, error)
            continue
        yield entry, made
        found += 1
        if found == wanted:
            return
    if not found and requests.size is not None:
        raise InvalidInput(requests.origin, f"none of {requests.file} can be used: {'; '.join(requests.skipped[:3])}")
    if not found and refusal is not None:
        raise refusal
