"""Models that are run before they are ready."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from runtime.errors import EngineError, InvalidInput
from runtime.pipeline import Call, Example, ModelPipeline, Pipeline
from runtime.placing.loading import LoadedModel
from runtime.placing.placement import Place
from serving.host.warming import warmed
from tests.fakes.serving import FakeModel, bundle


class Once(ModelPipeline):
    """Its requests are numbers of calls; those below 1 are refused."""

    def __init__(self, *examples: Example) -> None:
        self._examples, self.prepared = examples, False

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    @property
    def origins(self) -> Mapping[str, str]:
        return {}

    def examples(self) -> Iterator[Example]:
        yield from self._examples

    def prepare(self) -> None:
        self.prepared = True

    def __call__(self, request: int) -> Pipeline:
        if request < 1:
            raise InvalidInput("calls", f"is {request}, expected 1 or more")
        return self._run(request)

    def _run(self, calls: int) -> Pipeline:
        for _ in range(calls):
            yield Call("denoiser", {})


class Warm(FakeModel):
    def __init__(self, *examples: Example) -> None:
        super().__init__()
        self.pipeline = Once(*examples)  # type: ignore[method-assign,assignment]


def load(model: FakeModel, folder: Path) -> FakeModel:
    opened = bundle(folder, "one")
    found = warmed(lambda *_: model)(opened, None)
    assert found is model
    return model


def test_every_example_runs_once(tmp_path: Path) -> None:
    refused = Example("nothing", 0, optional=True)
    model = load(Warm(Example("a", 2), refused, Example("b", 1)), tmp_path)
    assert model.calls == 3
    assert model.pipeline.prepared  # type: ignore[attr-defined]


def test_a_model_that_cannot_run_is_not_loaded(tmp_path: Path) -> None:
    model = Warm(Example("a", 1))
    model.failure = EngineError("the device was lost")
    with pytest.raises(EngineError, match="was lost"):
        load(model, tmp_path)
    assert model.closed
    with pytest.raises(InvalidInput, match="is 0"):
        load(Warm(Example("nothing", 0)), tmp_path / "other")


def test_a_model_that_is_loaded_elsewhere_is_warmed_up_there(tmp_path: Path) -> None:
    """Its first device was lost."""
    opened, fakes = bundle(tmp_path, "one"), [Warm(Example("a", 2)), Warm(Example("a", 2)), Warm(Example("a", 2))]
    fakes[2].failure = EngineError("the other device was lost, too")
    numbers = iter(range(3))

    def loaded(broken: Collection[Place] = ()) -> LoadedModel:
        fake = fakes[next(numbers)]
        return LoadedModel(
            opened, fake.task, fake.target, fake.device, fake.engines, fake.pipeline, {}, (), loaded
        )  # fmt: skip

    first = warmed(lambda *_: loaded())(opened, None)
    assert [fake.calls for fake in fakes] == [2, 0, 0]
    second = first.elsewhere(())
    assert [fake.calls for fake in fakes] == [2, 2, 0]
    with pytest.raises(EngineError, match="too"):
        second.elsewhere(())
