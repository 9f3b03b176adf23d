"""What the commands show: a progress bar while a picture is drawn, text as it is decoded, the table of devices.

Results go to standard output, everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.limits import MESSAGE
from serving.enginecast_pb import chat_pb2, image_pb2

errors: Final = Console(stderr=True, highlight=False)


def draw(responses: Iterable[image_pb2.GenerateResponse], out: Path) -> list[Path]:
    """Show the progress of a picture request and write its pictures; returns their paths. Nothing is written before all are there."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    images: list[image_pb2.Image] = []
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        for response in responses:
            match response.WhichOneof("event"):
                case "queued":
                    bar.update(task, description=f"queued behind {response.queued.position}" if response.queued.position else "starting")
                case "progress":
                    bar.update(task, description="drawing", completed=response.progress.step, total=response.progress.total)
                case "image":
                    images.append(response.image)
                case "done":
                    _summary(response.done, f"seed {', '.join(str(image.seed) for image in images)}")
    paths = [out] if len(images) == 1 else [out.with_stem(f"{out.stem}-{image.index}") for image in images]
    for path, image in zip(paths, images, strict=True):
        write(path, image.png)
    return paths


def speak(responses: Iterable[chat_pb2.ChatResponse]) -> str:
    """Print an answer as it is decoded; returns all of it."""
    answer = ""
    for response in responses:
        match response.WhichOneof("event"):
            case "delta":
                answer += response.delta.text
                sys.stdout.write(response.delta.text)
                sys.stdout.flush()
            case "done":
                sys.stdout.write("\n")
                sys.stdout.flush()
                cut = ", cut at max tokens" if response.done.reason == chat_pb2.FINISH_REASON_LENGTH else ""
                _summary(response.done, f"{response.done.completion_tokens} tokens{cut}")
    return answer


def read_image(path: Path) -> bytes:
    """The bytes of a picture file. Raises NotFound."""
    try:
        return read_regular(path, MESSAGE.most)
    except OSError as error:
        raise NotFound(f"picture {path} cannot be read: {error.strerror}") from None


def check_output(path: Path) -> None:
    """Raise, before any work is done, when a picture cannot be written there: NotFound, InvalidInput."""
    if path.suffix.lower() != ".png":
        raise InvalidInput("out", f"'{path}' has no .png ending, which is what is written")
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist: make it, or write elsewhere with --out")


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError as error:
        raise InvalidInput("out", f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)  # mkstemp's files are private to the user
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _summary(done: image_pb2.ImageDone | chat_pb2.ChatDone, what: str) -> None:
    timings, engines = done.timings, done.engines
    where = ", ".join(dict.fromkeys(f"{use.target} ({use.device})" for use in engines))
    again = sum(use.reload_seconds for use in engines)
    loading = f", {again:.1f} s of it loading again" if again else ""
    errors.print(f"{what}, {timings.run_seconds:.1f} s on {where}{loading}", style="dim", markup=False, soft_wrap=True)
    for use in engines:
        for fallback in use.fallbacks:
            errors.print(f"{use.submodel}: {fallback}", style="dim", markup=False, soft_wrap=True)
    for note in done.notes:
        errors.print(f"note: {note}", style="dim", markup=False, soft_wrap=True)
