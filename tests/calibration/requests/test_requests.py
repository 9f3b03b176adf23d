"""Built-in requests: general ones for any model, an exam's own for its checkpoint."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from calibration.requests.exams import Exam, exams
from calibration.requests.files import read_prompts
from calibration.requests.requests import BRIEF_REQUESTS, REQUESTS, NamedRequest, accepted, briefly, built_in
from calibration.requests.task import task_requests
from calibration.requests.tasks.chat import BRIEF_TOKENS
from calibration.requests.tasks.image import BRIEF_STEPS, PROMPTS
from export.task import comparisons
from runtime.errors import InvalidInput
from runtime.task import tasks
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest


def prompts(entries: list[NamedRequest]) -> list[str]:
    return [one.request.prompt for one in entries if isinstance(one.request, ImageRequest)]


def wording(request: Any) -> str:
    return str(request.prompt if isinstance(request, ImageRequest) else request.messages[0].content[1])


def fussy(entry: NamedRequest) -> str:
    (prompt,) = prompts([entry])
    if prompt in {text for text, _ in PROMPTS[::2]}:
        raise InvalidInput("prompt", "is too long")
    return prompt


def deaf(_entry: NamedRequest) -> str:
    raise InvalidInput("prompt", "is too long")


def test_there_is_a_room_for_every_task() -> None:
    assert task_requests().keys() == tasks().keys() == comparisons().keys()


def test_built_in_requests_have_no_end() -> None:
    requests = built_in("image", 3)
    assert requests.wanted(None) == REQUESTS and requests.wanted(50) == 50
    entries = list(islice(requests.entries, 40))
    assert [one.name for one in entries[:3]] == ["built-in 1", "built-in 2", "built-in 3"]
    assert [one.request.seed for one in entries[:3]] == [3, 4, 5]


@pytest.mark.parametrize("exam", exams(), ids=lambda exam: exam.title)
def test_a_checkpoint_with_an_exam_is_calibrated_with_its_requests(exam: Exam) -> None:
    own = next(exam.calibration(5))
    task = own.task
    found, general = (next(built_in(task, 5, key).entries).request for key in (exam.fingerprint, "0" * 64))
    assert wording(found) == wording(own) != wording(general)


def test_brief_requests_are_the_same_but_short(tmp_path: Path) -> None:
    brief, usual = briefly(built_in("image", 3)), built_in("image", 3)
    assert brief.wanted(None) == BRIEF_REQUESTS and brief.wanted(50) == 50
    for (short, long), steps in zip(zip(brief.entries, usual.entries, strict=False), BRIEF_STEPS, strict=False):
        assert isinstance(long.request, ImageRequest) and isinstance(short.request, ImageRequest)
        assert (short.name, short.request.prompt, short.request.seed) == (
            long.name,
            long.request.prompt,
            long.request.seed,
        )
        assert short.request.steps == steps != long.request.steps
    (tmp_path / "prompts.txt").write_text("what is it?\n")
    (entry,) = briefly(read_prompts(tmp_path / "prompts.txt", "chat")).entries
    assert isinstance(entry.request, ChatRequest) and entry.request.max_tokens == BRIEF_TOKENS


def test_built_in_requests_that_a_model_cannot_read_are_skipped() -> None:
    requests = built_in("image")
    assert [prompt for _, prompt in accepted(fussy, requests, 5)] == [text for text, _ in PROMPTS[1:11:2]]
    assert requests.skipped == []
    with pytest.raises(InvalidInput, match="too long"):
        list(accepted(deaf, built_in("image"), 5))
