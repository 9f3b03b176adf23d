"""Tasks and pipelines are found by listing their folders, and belong together."""

from __future__ import annotations

import pytest

from runtime.errors import BundleError
from runtime.pipeline import pipelines
from runtime.task import Request, task, tasks


def test_every_pipeline_answers_the_requests_of_a_task() -> None:
    assert {pipeline.task for pipeline in pipelines().values()} == set(tasks())


@pytest.mark.parametrize("name", list(tasks()))
def test_a_task(name: str) -> None:
    assert task(name).name == name and issubclass(task(name).request, Request)


def test_no_task() -> None:
    with pytest.raises(BundleError, match=r"the task 'imaeg' is not known to this program: did you mean 'image'\?"):
        task("imaeg")
