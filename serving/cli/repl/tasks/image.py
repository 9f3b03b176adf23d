"""Drawing: each line is the prompt of a picture, which is saved under a new name and shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import numpy as np
import typer

from runtime.diffusion.infotext import KEY, told
from runtime.errors import InvalidInput, NotFound
from runtime.files import written
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import encode_image
from serving.cli import terminal
from serving.cli.drawing import Added, Canvas, Conditions
from serving.cli.options import UINT32
from serving.cli.plain import Plain
from serving.cli.repl import lines, showing
from serving.cli.repl.loop import Repl
from serving.cli.repl.settings import Settings
from serving.cli.repl.stopping import stopping
from serving.dialects.python.requests import image_request

STRANGE: Final = re.compile(r"[^\w@.-]+|^\.+")
"""What names of models may have and names of files had better not."""


@dataclass(frozen=True)
class Saving:
    """Settings of what is written."""

    images: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Number of pictures for each line.")] = None
    folder: Annotated[Path, typer.Option(help="Where pictures are written, as NAME-0001.png and so on.")] = Path()


class Draw(Repl):
    """Pictures from prompts. A picture that Ctrl-C stopped is not written."""

    task: ClassVar[str] = ImageRequest.task
    greeting = "Draw with"

    @staticmethod
    def options() -> tuple[object, ...]:
        return Plain(), Saving(), Added(), Canvas(), Conditions()

    @staticmethod
    def request(settings: Settings) -> ImageRequest:
        if not (folder := settings.of(Saving).folder).is_dir():
            raise NotFound(f"folder {folder} does not exist: make it, or write elsewhere")
        if not os.access(folder, os.W_OK):
            raise InvalidInput("folder", f"{folder} cannot be written: write elsewhere")
        return image_request("", _given(settings))

    def take(self, text: str) -> None:
        request = image_request(terminal.unicode("prompt", text), _given(self.settings))
        with stopping(lambda: self.session.draw(request)) as stream:
            drawing = terminal.draw(stream, self.screen.verbose)
        for one in drawing.images:
            print(self._save(request, one), flush=True)
            showing.show(np.asarray(one.image, np.uint8), self.screen.pictures)

    def once(self, prompt: str | None) -> None:
        """Draw a prompt, or a picture for each line that is piped in."""
        if prompt is None:
            self.run(lines.piped(), patient=False)
        elif prompt.strip():
            self.take(prompt)
        else:
            raise InvalidInput("prompt", "is empty: say what to draw")

    def _save(self, request: ImageRequest, one: ImageReady) -> Path:
        """Write a picture with its parameters under the next name that is free."""
        content = encode_image(np.asarray(one.image, np.uint8), texts={KEY: told(request, one)})
        with _claimed(self.settings.of(Saving).folder, STRANGE.sub("-", self.name)) as path, written(path) as file:
            file.write(content)
        return path


def _given(settings: Settings) -> dict[str, Any]:
    """The options of a request."""
    conditions = settings.of(Conditions)
    groups = (settings.of(Plain), settings.of(Added), settings.of(Canvas))
    options = {name: value for group in groups for name, value in group.given().items()}
    return options | conditions.sizes() | conditions.scores() | {"images": settings.of(Saving).images}


@contextmanager
def _claimed(folder: Path, name: str) -> Iterator[Path]:
    """The path of a new, empty file NAME-0001.png, with the next number of those that are there. It is removed where
    the block fails.
    """
    numbers = (re.fullmatch(rf"{re.escape(name)}-(\d{{4,9}})\.png", file.name) for file in folder.iterdir())
    number = max((int(found[1]) for found in numbers if found), default=0)
    while True:
        number += 1
        path = folder / f"{name}-{number:04}.png"
        try:
            path.touch(exist_ok=False)
            break
        except FileExistsError:  # another process was faster
            continue
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


REPL: Final = Draw
