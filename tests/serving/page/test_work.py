"""What the page shows of a request and of a grid while they are drawn."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest

from runtime.errors import InvalidInput, NotFound, PermissionDenied
from runtime.grid.axes import Axis
from runtime.grid.plan import GridPlan
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.tasks.image import ImageRequest
from runtime.vision.images import decode_image
from serving.page.backend import Visitor
from serving.page.parts import Page
from serving.page.pictures import KEPT_SECONDS, parameters
from serving.page.runs import Runs
from serving.page.work import Step, Work
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.scopes import Scope
from tests.fakes.serving import FakeModel, FakeServer
from tests.serving.page.conftest import Able

PLAN = GridPlan(
    ImageRequest("a circle", steps=2, seed=5), {"x": Axis("steps", (1, 2, 3)), "y": Axis("sampler", ("euler", "ddim"))}
)


class Refining(FakeServer):
    """A server that has a second model that draws."""

    kinds: ClassVar[Mapping[str, type[FakeModel]]] = MappingProxyType({"draw": FakeModel, "refine": FakeModel})


class Drawing:
    """An open page of a fake server, and what it draws."""

    def __init__(self, fake: FakeServer, folder: Path) -> None:
        self.fake, self.folder, self.backend = fake, folder, Able(fake.host)
        self.work = Work(Page(self.backend, Runs(self.backend), folder, ()), Visitor("session"), "draw", "draw")

    def steps(self, made: Callable[[], AsyncGenerator[Step, None]], pictures: int = 1000) -> list[Step]:
        """The steps of a drawing, until there are so many pictures."""

        async def collected() -> list[Step]:
            found = []
            async with aclosing(made()) as steps:
                async for step in steps:
                    found.append(step)
                    if len(step.pictures or ()) >= pictures:
                        break
            return found

        return self.fake.do(collected())

    def grid(self, pictures: int = 1000) -> list[Step]:
        """The steps of PLAN."""
        return self.steps(lambda: self.work.grid(PLAN), pictures)


@pytest.fixture
def drawing(tmp_path: Path) -> Iterator[Drawing]:
    lists, folder = tmp_path / "lists", tmp_path / "page"
    lists.mkdir()
    folder.mkdir()
    (lists / "colour.txt").write_text("green\n")
    with Refining(tmp_path / "bundles", ready=True, scripts=Scripts(Folders(wildcards=lists))) as fake:
        yield Drawing(fake, folder)


def test_pictures_are_there_as_they_finish(drawing: Drawing) -> None:
    request = ImageRequest("a circle", steps=2, seed=7, images=3, preview_every=1)
    steps = drawing.steps(lambda: drawing.work.pictures(request))
    counts = [(len(step.pictures), step.last) for step in steps if step.pictures is not None]
    assert counts == [(1, False), (2, False), (3, True)]
    assert sum(step.preview is not None for step in steps) == 2
    assert "a picture of 3" in next(step.line for step in steps if step.pictures)
    assert "3 pictures in" in steps[-1].line
    last = next(step for step in reversed(steps) if step.pictures)
    assert [label for _, label in last.pictures or ()] == ["seed 7", "seed 8", "seed 9"]
    assert all("Seed: " in parameters(Path(file)) for file, _ in last.pictures or ())
    assert last.text == parameters(Path((last.pictures or [])[-1][0]))


def test_a_file_says_what_scripts_made_of_the_prompt(drawing: Drawing) -> None:
    request = ImageRequest("a __colour__ circle", steps=1, scripts={"wildcards": {}})
    steps = drawing.steps(lambda: drawing.work.pictures(request))
    assert next(step.text for step in steps if step.text is not None).startswith("a green circle\n")


def test_another_model_goes_on(drawing: Drawing) -> None:
    request = ImageRequest("a circle", steps=2, images=2, seed=3, denoising_end=0.8, loras={"soft": 1})
    steps = drawing.steps(lambda: drawing.work.refined(request, "refine", {"aesthetic_score": 7}))
    first, second = map(_image, drawing.backend.requests)
    assert (first.denoising_end, first.denoising_start) == (0.8, None)
    assert (second.denoising_end, second.denoising_start, second.aesthetic_score) == (None, 0.8, 7)
    assert (second.seed, dict(second.loras)) == (3, {})
    assert second.latents is not None
    assert len(second.latents) == 2
    assert "draw: step 1 of 2" in "".join(step.line for step in steps)
    assert [len(step.pictures) for step in steps if step.pictures] == [1, 2]
    text = next(step.text for step in steps if step.text)
    assert text.startswith("a circle <lora:soft:1>")
    assert "Model: draw, Refiner: refine, Refiner switch at: 0.8" in text


def test_a_grid_is_shown_cell_by_cell_and_at_last_as_one_page(drawing: Drawing) -> None:
    steps = drawing.grid()
    assert [len(step.pictures) for step in steps if step.pictures] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert any("cell 4 of 6: step 1 of 1" in step.line for step in steps)
    page, *cells = steps[-1].pictures or ()
    assert page[1] == "grid"
    assert [label for _, label in cells][:4] == [
        "steps: 1 · euler", "steps: 2 · euler", "steps: 3 · euler", "steps: 1 · ddim"
    ]  # fmt: skip
    height, width, _ = decode_image(Path(page[0]).read_bytes()).shape
    assert width > 3 * 16
    assert height > 2 * 8
    assert steps[-1].text == parameters(Path(page[0]))
    assert "Script: X/Y/Z plot, X Type: steps" in steps[-1].text
    assert [(one.steps, one.sampler, one.seed) for one in map(_image, drawing.backend.requests)] == [
        (steps, sampler, 5) for sampler in ("euler", "ddim") for steps in (1, 2, 3)
    ]


def test_a_grid_that_was_stopped_goes_on(drawing: Drawing) -> None:
    drawing.grid(pictures=2)
    assert len(drawing.backend.requests) == 2
    whole = drawing.grid()[-1].pictures or []
    assert len(drawing.backend.requests) == 6
    assert (drawing.grid()[-1].pictures or [])[1:] == whole[1:]
    assert len(drawing.backend.requests) == 6


def test_old_cells_are_drawn_again(drawing: Drawing) -> None:
    drawing.grid()
    for file in drawing.folder.rglob("*.png"):
        os.utime(file, (0, file.stat().st_mtime - KEPT_SECONDS - 1))
    drawing.grid()
    assert len(drawing.backend.requests) == 12
    assert len(list(drawing.folder.rglob("*.png"))) == 7


def test_mistakes_of_a_grid(drawing: Drawing) -> None:
    drawing.fake.draw.failure = InvalidInput("steps", "is too much")
    with pytest.raises(InvalidInput, match="is too much"):
        drawing.grid()
    drawing.work = Work(
        Page(drawing.backend, Runs(drawing.backend), drawing.folder, ()), Visitor("session"), "draw", "none"
    )
    with pytest.raises(NotFound):
        drawing.grid()


def _image(request: object) -> ImageRequest:
    assert isinstance(request, ImageRequest)
    return request


def test_kept_cells_are_only_for_those_who_may_draw(drawing: Drawing, tmp_path: Path) -> None:
    assert drawing.steps(lambda: drawing.work.grid(PLAN))[-1].last
    file = tmp_path / "tokens.toml"
    secrets = [tokens.new(file, one.value, frozenset({one}), None, None) for one in (Scope.INFER, Scope.METRICS)]
    backend = Able(drawing.fake.host, Gate(file))
    page = Page(backend, Runs(backend), drawing.folder, ())
    may, not_may = (Work(page, Visitor("session", f"Bearer {one}"), "draw", "draw") for one in secrets)
    assert drawing.steps(lambda: may.grid(PLAN))[-1].last and not backend.requests
    with pytest.raises(PermissionDenied, match="has the scopes metrics"):
        drawing.steps(lambda: not_may.grid(PLAN))
