"""Output of the commands: a progress bar while a picture is drawn, text as it is decoded, notes.

Results go to standard output, everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unicodedata import category

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from runtime.errors import InvalidInput, NotFound, quoted
from runtime.files import read_regular
from runtime.limits import PICTURE_BYTES
from runtime.pipeline import Progress
from runtime.tasks.chat import TextDelta
from runtime.vision.images import decode_image
from serving.dialects.python.results import Answer, Drawing, Matching, Vectors
from serving.dialects.python.stream import Stream
from serving.host.job import Done, Queued

errors: Final = Console(stderr=True, highlight=False)


def _bar() -> Bar:
    """A bar with times on standard error, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=errors, transient=True, disable=not errors.is_terminal)


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how many of `total` are done; what is returned is called for each."""
    with _bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def draw(stream: Stream[Drawing], verbose: bool = False) -> Drawing:
    """Show the progress of a picture request; returns its pictures. `verbose` adds what each submodel ran on."""
    with _bar() as bar, stream:
        task = bar.add_task("starting", total=None)
        for event in stream:
            match event:
                case Queued(position):
                    bar.update(task, description=f"queued behind {position}" if position else "starting")
                case Progress(step, total):
                    bar.update(task, description="drawing", completed=step, total=total)
        drawing = stream.result()
    for one in drawing.images:
        if one.prompt is not None:
            say(f"prompt of picture {one.index}: {one.prompt}")
        if one.negative_prompt is not None:
            say(f"negative prompt of picture {one.index}: {one.negative_prompt}")
    _summary(drawing.done, f"seed {', '.join(str(image.seed) for image in drawing.images)}", verbose)
    return drawing


class Speaker:
    """Prints an answer as it is decoded, without its leading blanks, several with an empty line between. `text` is that
    of the first so far, also if the stream ends early. `verbose` adds what each submodel ran on.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.text = ""
        self._verbose = verbose

    def speak(self, stream: Stream[Answer]) -> str:
        """Print the answer and return the text of the first. Raises the errors of the stream."""
        number, begun = 0, False
        with stream:
            for event in stream:
                if isinstance(event, TextDelta):
                    begun = begun and event.answer == number
                    _write("\n\n" * (event.answer - number) + (event.text if begun else event.text.lstrip()))
                    number, begun = event.answer, begun or bool(event.text.strip())
                    self.text += "" if number else event.text
            answer = stream.result()
        _write("\n\n" * (len(answer.choices) - 1 - number) + "\n")
        gone = f", without the {answer.left_out} oldest messages that may go" if answer.left_out else ""
        _likelihoods(answer)
        _summary(answer.done, f"{_length(answer)}{gone}", self._verbose)
        return answer.text


def caption(path: Path, answer: Answer, verbose: bool = False) -> None:
    """Print a line for each caption of a picture: the picture's path, a tab and the caption."""
    for one in answer.choices:
        print(f"{path}\t{' '.join(one.text.split())}", flush=True)
    _likelihoods(answer)
    if verbose:
        _summary(answer.done, _length(answer), verbose)


def vectors(found: Vectors, images: Sequence[str], texts: Sequence[str], verbose: bool = False) -> None:
    """Print embeddings, a line of JSON each: first those of the texts."""
    for field, names, arrays in (("text", texts, found.texts), ("image", images, found.images)):
        for name, array in zip(names, arrays, strict=True):
            print(json.dumps({field: name, "embedding": array.tolist()}, ensure_ascii=False))
    _summary(found.done, f"{_counted(len(texts), 'text')}, {_counted(len(images), 'picture')}", verbose)


def scores(found: Matching, images: Sequence[str], texts: Sequence[str], verbose: bool = False) -> None:
    """Print a line for every picture with every text: score, picture and text, with tabs between."""
    for image, row in zip(images, found.scores, strict=True):
        for text, score in zip(texts, row, strict=True):
            print(f"{score:.6g}\t{image}\t{' '.join(text.split())}")
    _summary(found.done, _counted(found.scores.size, "pair"), verbose)


def read_image(path: Path) -> bytes:
    """The bytes of a picture file. Raises NotFound, or InvalidInput naming the file when it is no picture."""
    try:
        data = read_regular(path, PICTURE_BYTES.most)
    except OSError as error:
        raise NotFound(f"picture {path} cannot be read: {error.strerror}") from None
    decode_image(data, str(path))
    return data


def path(field: str, text: str, needed: str = "the PATH of a file") -> Path:
    """The path that was typed, maybe in quotes or with ~. Raises InvalidInput where there is none, or no such user."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise InvalidInput(field, f"needs {needed}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidInput(field, f"is {quoted(text)}: {error}") from None


def unicode(field: str, text: str) -> str:
    """The same text. Raises InvalidInput where it is not valid UTF-8, which arguments hold as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, "is no valid UTF-8 text") from None
    return text


def check_output(path: Path) -> None:
    """Raise NotFound or InvalidInput where no picture can be written, before any work."""
    if path.suffix.lower() != ".png":
        raise InvalidInput("out", f"'{path}' has no .png ending: pictures are written as PNG files")
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist: make it, or write elsewhere with --out")
    if path.is_dir():
        raise InvalidInput("out", f"{path} is a folder, expected the name of a file such as {path / 'picture.png'}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput("out", f"folder {path.parent} cannot be written: write elsewhere")


def _summary(done: Done, what: str, verbose: bool) -> None:
    """One short line on how long it took and where; the notes of the model; with `verbose` a line for each submodel."""
    engines = done.engines
    again = sum(use.reload_seconds for use in engines)
    loading = f", {again:.1f} s of it loading again" if again else ""
    partly = [use.submodel for use in engines if use.fallbacks]
    elsewhere = f", parts of {', '.join(partly)} elsewhere (-v lists them)" if partly and not verbose else ""
    where = " and ".join(dict.fromkeys(use.target for use in engines))
    say(f"{what}, {done.run_seconds:.1f} s on {where}{loading}{elsewhere}")
    for use in engines if verbose else ():
        calls = _counted(use.calls, "call")
        say(f"  {use.submodel}: {calls}, {use.seconds:.2f} s on {use.device}, {use.precision}")
        for line in (*use.fallbacks, *use.choices):
            say(f"    {line}")
    for note in done.notes:
        say(f"note: {note}")


def _likelihoods(answer: Answer) -> None:
    """A line for each token whose log probability was asked for: the token, then the likeliest in its place."""
    for choice in answer.choices:
        for one in choice.logprobs:
            others = ", ".join(f"{other.text!r} {other.logprob:.3f}" for other in one.top)
            say(f"  {one.text!r} {one.logprob:.3f}{' of ' * bool(others)}{others}")


def _length(answer: Answer) -> str:
    """How long an answer is, or several together."""
    several = f"{len(answer.choices)} answers, " if len(answer.choices) > 1 else ""
    cut = ", cut at max tokens" if any(one.reason == "length" for one in answer.choices) else ""
    return f"{several}{sum(one.completion_tokens for one in answer.choices)} tokens{cut}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def report(text: str) -> None:
    """Print a line on standard error."""
    errors.print(printable(text), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """A text from elsewhere without characters that control terminals."""
    return "".join(char if char in "\n\t" or category(char) != "Cc" else "?" for char in text)


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line on standard error."""
    errors.print(text, style="dim", markup=False, soft_wrap=True)
