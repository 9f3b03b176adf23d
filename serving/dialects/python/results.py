"""The results of requests, collected from the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.infotext import KEY, told
from runtime.errors import Cancelled
from runtime.files import written
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Event
from runtime.tasks.chat import Finished, TextDelta
from runtime.tasks.embed import Embeddings, Scores
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture, encode_image
from serving.host.job import Done


@dataclass(frozen=True, eq=False)
class Drawing:
    """Finished pictures. `images` holds each with its index and seed, `done` the times and the engines that ran,
    `request` what was asked; None where another client asked it.
    """

    images: tuple[ImageReady, ...]
    done: Done
    request: ImageRequest | None = None

    @property
    def image(self) -> Picture:
        """The first picture: uint8 RGB [height, width, 3]."""
        return np.asarray(self.images[0].image, np.uint8)

    @property
    def latents(self) -> NDArray[np.float32] | None:
        """Latents of all pictures, [images, channels, height, width], for another model to go on with; None where the
        request had no `denoising_end`.
        """
        found = [one.latents for one in self.images if one.latents is not None]
        return np.stack(found).astype(np.float32, copy=False) if found else None

    def save(self, path: str | Path) -> list[Path]:
        """Write PNG files and return their paths: `path`, or for several pictures NAME-0.png, NAME-1.png and so on.
        Each has its parameters in it, as Automatic1111's web UI writes them, where the `request` is known.

        A file has its name only once it is complete. Raises OSError, and ResourceExhausted when the disk is full.
        """
        out = Path(path)
        paths = [out] if len(self.images) == 1 else [out.with_stem(f"{out.stem}-{one.index}") for one in self.images]
        for file, one in zip(paths, self.images, strict=True):
            with written(file) as target:
                texts = {} if self.request is None else {KEY: told(self.request, one)}
                target.write(encode_image(np.asarray(one.image, np.uint8), texts=texts))
        return paths


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request. `reason` is "stop" (the model ended it, a stop string, or its grammar is
    complete) or "length" (`max_tokens` was reached); `completion_tokens` is its length. `logprobs`, where they were
    asked for, are those of the tokens that its text is made of. With `lookup_tokens` or `draft_tokens`,
    `guessed_tokens` were guessed, of which `accepted_tokens` were right.
    """

    text: str
    reason: str
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Answer:
    """A finished answer. `choices` are all of them, as many as the request's `answers`; `text`, `reason` and
    `completion_tokens` are those of the first.

    `prompt_tokens` is the length of the conversation; `done` holds the times in seconds and the engines that ran.
    `left_out` is how many messages the conversation lost to fit the context. `reused_tokens` of the prompt were not
    computed again, since the model had read them before.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    done: Done
    left_out: int = 0
    reused_tokens: int = 0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reason(self) -> str:
        return self.choices[0].reason

    @property
    def completion_tokens(self) -> int:
        return self.choices[0].completion_tokens

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Vectors:
    """Embeddings in the order of the request, as the model's own forward gives them.

    `texts` are float32 [texts, width]; `images` float32 [images, width], or [images, vectors, width] of a model with
    several vectors of a picture, such as BLIP-2. `done` holds the times and the engines that ran.
    """

    texts: NDArray[np.float32]
    images: NDArray[np.float32]
    done: Done


@dataclass(frozen=True, eq=False)
class Matching:
    """`scores` float32 [images, texts] of every picture with every text, larger is closer; see `Session.match`. `done`
    holds the times and the engines that ran.
    """

    scores: NDArray[np.float32]
    done: Done


def vectors(events: Sequence[Event]) -> Vectors:
    """The embeddings of a stream that has ended. Raises Cancelled if it was closed early."""
    done = _done(events)
    found = next(event for event in events if isinstance(event, Embeddings))
    return Vectors(found.texts, found.images, done)


def matching(events: Sequence[Event]) -> Matching:
    """The scores of a stream that has ended. Raises Cancelled if it was closed early."""
    done = _done(events)
    return Matching(next(event for event in events if isinstance(event, Scores)).scores, done)


def drawing(events: Sequence[Event], request: ImageRequest | None = None) -> Drawing:
    """The pictures of a stream that has ended. Raises Cancelled if it was closed early."""
    return Drawing(tuple(event for event in events if isinstance(event, ImageReady)), _done(events), request)


def answer(events: Sequence[Event]) -> Answer:
    """The answers of a stream that has ended. Raises Cancelled if it was closed early."""
    done = _done(events)
    finished = [event for event in events if isinstance(event, Finished)]
    deltas = [event for event in events if isinstance(event, TextDelta)]

    def choice(end: Finished) -> Choice:
        own = [delta for delta in deltas if delta.answer == end.answer]
        logprobs = tuple(one for delta in own for one in delta.logprobs)
        text, guesses = "".join(delta.text for delta in own), (end.guessed_tokens, end.accepted_tokens)
        return Choice(text, end.reason, end.completion_tokens, logprobs, *guesses)

    first = finished[0]
    return Answer(tuple(map(choice, finished)), first.prompt_tokens, done, first.left_out, first.reused_tokens)


def _done(events: Sequence[Event]) -> Done:
    if events and isinstance(events[-1], Done):
        return events[-1]
    raise Cancelled("the stream was closed before the work was done")
