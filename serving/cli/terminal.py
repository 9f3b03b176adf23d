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
from runtime.limits import PICTURE_BYTES
from runtime.vision.images import decode_image
from serving.enginecast_pb import chat_pb2, image_pb2

errors: Final = Console(stderr=True, highlight=False)


def draw(responses: Iterable[image_pb2.GenerateResponse], out: Path, verbose: bool = False) -> list[Path]:
    """Show the progress of a picture request and write its pictures; returns their paths. Nothing is written before all
    are there.

    `verbose` adds what each submodel ran on.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    images: list[image_pb2.Image] = []
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        for response in responses:
            match response.WhichOneof("event"):
                case "queued":
                    bar.update(
                        task,
                        description=f"queued behind {response.queued.position}"
                        if response.queued.position
                        else "starting",
                    )
                case "progress":
                    bar.update(
                        task, description="drawing", completed=response.progress.step, total=response.progress.total
                    )
                case "image":
                    images.append(response.image)
                case "done":
                    _summary(response.done, f"seed {', '.join(str(image.seed) for image in images)}", verbose)
    paths = [out] if len(images) == 1 else [out.with_stem(f"{out.stem}-{image.index}") for image in images]
    for path, image in zip(paths, images, strict=True):
        write(path, image.png)
    return paths


def speak(responses: Iterable[chat_pb2.ChatResponse], verbose: bool = False) -> str:
    """Print an answer as it is decoded, without the blanks that it begins with; returns all of it.

    `verbose` adds what each submodel ran on.
    """
    answer = ""
    for response in responses:
        match response.WhichOneof("event"):
            case "delta":
                sys.stdout.write(response.delta.text if answer.strip() else response.delta.text.lstrip())
                sys.stdout.flush()
                answer += response.delta.text
            case "done":
                sys.stdout.write("\n")
                sys.stdout.flush()
                cut = ", cut at max tokens" if response.done.reason == chat_pb2.FINISH_REASON_LENGTH else ""
                _summary(response.done, f"{response.done.completion_tokens} tokens{cut}", verbose)
    return answer


def read_image(path: Path) -> bytes:
    """The bytes of a picture file. Raises NotFound, or InvalidInput naming the file when it is no picture."""
    try:
        data = read_regular(path, PICTURE_BYTES.most)
    except OSError as error:
        raise NotFound(f"picture {path} cannot be read: {error.strerror}") from None
    decode_image(data, str(path))
    return data


def unicode(field: str, text: str) -> str:
    """The text, if it can be sent: what is no UTF-8 reaches a program as half surrogates. Raises InvalidInput."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, "is no valid UTF-8 text") from None
    return text


def check_output(path: Path) -> None:
    """Raise, before any work is done, when no picture can be written there: NotFound, InvalidInput."""
    if path.suffix.lower() != ".png":
        raise InvalidInput("out", f"'{path}' has no .png ending, which is what is written")
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist: make it, or write elsewhere with --out")
    if path.is_dir():
        raise InvalidInput("out", f"{path} is a folder, expected the name of a file such as {path / 'picture.png'}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput("out", f"folder {path.parent} cannot be written: write elsewhere")


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises InvalidInput or OSError."""
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


def _summary(done: image_pb2.ImageDone | chat_pb2.ChatDone, what: str, verbose: bool) -> None:
    """One short line on how long it took and where; the notes of the model; with `verbose` a line for each submodel."""
    engines = done.engines
    again = sum(use.reload_seconds for use in engines)
    loading = f", {again:.1f} s of it loading again" if again else ""
    partly = [use.submodel for use in engines if use.fallbacks]
    elsewhere = f", parts of {', '.join(partly)} elsewhere (-v tells which)" if partly and not verbose else ""
    where = " and ".join(dict.fromkeys(use.target for use in engines))
    _say(f"{what}, {done.timings.run_seconds:.1f} s on {where}{loading}{elsewhere}")
    for use in engines if verbose else ():
        calls = f"{use.calls} call{'s' * (use.calls != 1)}, {use.seconds:.2f} s"
        _say(f"  {use.submodel}: {calls} on {use.device}, {use.precision}")
        for line in (*use.fallbacks, *use.choices):
            _say(f"    {line}")
    for note in done.notes:
        _say(f"note: {note}")


def _say(text: str) -> None:
    errors.print(text, style="dim", markup=False, soft_wrap=True)
