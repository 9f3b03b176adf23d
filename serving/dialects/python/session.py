"""The methods that a loaded bundle and a client of a server have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, Unpack

from runtime.grid.plan import GridPlan
from runtime.pipeline import Event
from runtime.task import Request
from runtime.tasks.chat import ChatRequest
from runtime.tasks.embed import EmbedRequest, Match
from runtime.tasks.image import ImageRequest
from serving.dialects.python import grid, results
from serving.dialects.python.grid import GridDrawing, Kept
from serving.dialects.python.requests import (
    ChatOptions,
    ImageOptions,
    Message,
    PictureLike,
    caption_request,
    chat_request,
    embed_request,
    image_request,
)
from serving.dialects.python.results import Answer, Drawing, Matching, Vectors
from serving.dialects.python.stream import Stream

R = TypeVar("R")

AxisLike = tuple[str, str | Sequence[Any]]
"""A field and its values: ("steps", [10, 20]), or the same as text, ("steps", "10-50:10")."""
TOGETHER: Final = 4
"""Pictures whose captions are under way at once: a server lets few requests wait."""


class Session(ABC):
    """Runs requests: a `Model` in this process, a `Client` over gRPC. Every method raises subclasses of
    `EnginecastError`. Mistakes in a request raise InvalidInput, whose `field` names the option.
    """

    scripts: Mapping[str, Mapping[str, Any]] = {}
    """Scripts of requests that name none, by name with their arguments (docs/scripts.md)."""

    def generate(self, prompt: str, **options: Unpack[ImageOptions]) -> Drawing:
        """Draw pictures and wait for them: uint8 RGB [height, width, 3] each.

            model.generate("a red fox in the snow", steps=20, seed=1).save("fox.png")

        Raises InvalidInput, EngineError, ResourceExhausted; a Client also NotFound, Unavailable and DeadlineExceeded.
        """
        return self.generate_stream(prompt, **options).result()

    def generate_stream(self, prompt: str, **options: Unpack[ImageOptions]) -> Stream[Drawing]:
        """Draw pictures and follow the work: a `Progress` for each step, an `ImageReady` for each picture.

            with model.generate_stream("a red fox", preview_every=5) as stream:
                for event in stream:
                    ...
                drawing = stream.result()

        Under asyncio, `await model.generate_stream("a red fox")` gives the Drawing. Raises as `generate` does.
        """
        return self.draw(image_request(prompt, options))

    def grid(
        self,
        prompt: str,
        *,
        x: AxisLike | None = None,
        y: AxisLike | None = None,
        z: AxisLike | None = None,
        folder: str | Path | None = None,
        **options: Unpack[ImageOptions],
    ) -> GridDrawing:
        """Draw a grid of pictures (X/Y/Z plot) and wait for it: columns, rows and blocks differ in a field.

            model.grid("a red fox", x=("steps", [10, 20]), y=("sampler", ["euler", "ddim"])).save("grid.png")

        All cells have the same seed, unless it is on an axis, and each is what `generate` draws with its values. They
        are kept in `folder`, where a grid that was interrupted goes on; without a seed it then has one that follows
        from the other options. docs/grid.md lists the fields. Raises as `generate` does.
        """
        request = image_request(prompt, options)
        plan = GridPlan.of(request if folder is None else grid.resumable(request), {"x": x, "y": y, "z": z})
        return grid.grid(plan, self.draw, None if folder is None else Kept(Path(folder), self.identity))

    def chat(
        self,
        conversation: str | Sequence[Message],
        images: Sequence[PictureLike] = (),
        **options: Unpack[ChatOptions],
    ) -> Answer:
        """Answer a question about `images`, or the last message of a conversation, and wait for the whole answer.

            model.chat("What is in this picture?", [Path("fox.png")], max_tokens=100).text

        Raises InvalidInput, NotFound for a missing picture file, ContextLengthExceeded, EngineError,
        ResourceExhausted; a Client also Unavailable and DeadlineExceeded.
        """
        return self.chat_stream(conversation, images, **options).result()

    def chat_stream(
        self,
        conversation: str | Sequence[Message],
        images: Sequence[PictureLike] = (),
        **options: Unpack[ChatOptions],
    ) -> Stream[Answer]:
        """Answer piece by piece: each `TextDelta` holds one or more whole characters.

            for event in model.chat_stream("What is in this picture?", [picture]):
                if isinstance(event, TextDelta):
                    print(event.text, end="")

        Under asyncio, `await model.chat_stream(...)` gives the Answer. Raises as `chat` does.
        """
        return self.answer(chat_request(conversation, images, options))

    def captions(
        self, images: Sequence[PictureLike], prompt: str | None = None, **options: Unpack[ChatOptions]
    ) -> Iterator[Answer]:
        """Describe every picture, in order: each `Answer` as soon as it is there.

            for path, answer in zip(paths, model.captions(paths, beams=4)):
                print(path, answer.text)

        Without a `prompt` the model gets what it was trained to write captions for: BLIP-2 nothing but the picture,
        others an instruction. A few pictures are sent at once. Raises as `chat` does.
        """
        requests = [caption_request(image, prompt, options) for image in images]
        return self._answers(requests)

    def _answers(self, requests: Sequence[ChatRequest]) -> Iterator[Answer]:
        """The answers to requests, of which at most TOGETHER are under way."""
        with ExitStack() as stack:
            waiting = deque[Stream[Answer]]()
            for request in requests:
                waiting.append(stack.enter_context(self.answer(request)))
                if len(waiting) == TOGETHER:
                    yield waiting.popleft().result()
            yield from (stream.result() for stream in waiting)

    def embed(self, texts: Sequence[str] = (), images: Sequence[PictureLike] = ()) -> Vectors:
        """Embed texts and pictures, and wait for the vectors.

            found = model.embed(["a red fox"], [Path("fox.png")])
            found.texts @ found.images.T  # cosines

        Raises InvalidInput, NotFound for a missing picture file, EngineError, ResourceExhausted; a Client also
        Unavailable and DeadlineExceeded. `await session.vectors(...)` is the same under asyncio.
        """
        return self.vectors(embed_request(texts, images)).result()

    def match(self, images: Sequence[PictureLike], texts: Sequence[str], method: Match = "itc") -> Matching:
        """Compare every picture with every text: scores [images, texts], larger is closer.

            model.match([Path("fox.png")], ["a fox", "a dog"]).scores.argmax(axis=1)

        "itc" compares embeddings: the model's own scores, of CLIP the cosine times its scale, of SigLIP also plus its
        bias, of BLIP-2 the largest cosine of a picture's vectors. "itm" lets a network read both, of models that have
        one: the probability that they belong together. Raises as `embed` does.
        """
        return self.score(embed_request(texts, images, method)).result()

    def vectors(self, request: EmbedRequest) -> Stream[Vectors]:
        """The stream of a request for embeddings. Raises InvalidInput."""
        return self.run(request, results.vectors)

    def score(self, request: EmbedRequest) -> Stream[Matching]:
        """The stream of a request for scores. Raises InvalidInput."""
        return self.run(request, results.matching)

    def draw(self, request: ImageRequest) -> Stream[Drawing]:
        """The stream of a request for pictures. Raises InvalidInput."""
        return self.run(request, partial(results.drawing, request=request))

    def answer(self, request: ChatRequest) -> Stream[Answer]:
        """The stream of a request for an answer. Raises InvalidInput."""
        return self.run(request, results.answer)

    def _with_scripts(self, request: Request) -> Request:
        return replace(request, scripts=self.scripts) if self.scripts and not request.scripts else request

    @property
    @abstractmethod
    def identity(self) -> str:
        """What tells the model from others, in names of files that are kept."""

    @abstractmethod
    def run(self, request: Request, collect: Callable[[Sequence[Event]], R]) -> Stream[R]:
        """The stream of a request of any task; `collect` makes the result of its events. Raises InvalidInput."""

    @abstractmethod
    def close(self) -> None:
        """Stop running requests and free all resources."""
