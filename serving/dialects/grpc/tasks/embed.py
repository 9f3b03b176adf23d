"""EmbedService: converts requests for embeddings and scores, and their results."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime import limits
from runtime.errors import InvalidInput
from runtime.pipeline import Event
from runtime.tasks.embed import Embeddings, EmbedRequest, Match, Scores
from runtime.vision.images import PictureFile
from serving.dialects.grpc.messages import done_event, engines, file_of, queued, queued_event, timings
from serving.dialects.grpc.task import GrpcTask
from serving.enginecast_pb import embed_pb2, model_pb2
from serving.host.job import Done, Queued

MATCHES: Final[dict[int, Match | None]] = {
    embed_pb2.MATCH_UNSPECIFIED: None,
    embed_pb2.MATCH_ITC: "itc",
    embed_pb2.MATCH_ITM: "itm",
}
MATCH_NUMBERS: Final = {name: number for number, name in MATCHES.items()}


def embed_request(message: embed_pb2.EmbedRequest) -> EmbedRequest:
    """Convert a request. Picture files are not decoded yet. Raises InvalidInput that names the field."""
    limits.PICTURES.length("images", message.images)
    if message.match not in MATCHES:
        raise InvalidInput("match", "is unknown, expected MATCH_ITC, MATCH_ITM or none")
    images = (PictureFile.open(data, f"images[{i}]") for i, data in enumerate(message.images))
    return EmbedRequest(tuple(message.texts), tuple(images), MATCHES[message.match])


class EmbedStream:
    """Converts the events of one embedding request to responses."""

    def response(self, event: Event) -> embed_pb2.EmbedResponse | None:
        """The response for an event, None if it has none."""
        match event:
            case Queued():
                return embed_pb2.EmbedResponse(queued=queued(event))
            case Embeddings(texts, images, tokens):
                found = embed_pb2.Embeddings(texts=_message(texts), images=_message(images), prompt_tokens=tokens)
                return embed_pb2.EmbedResponse(embeddings=found)
            case Scores(scores):
                return embed_pb2.EmbedResponse(scores=embed_pb2.Scores(scores=_message(scores)))
            case Done():
                done = embed_pb2.EmbedDone(timings=timings(event), engines=engines(event), notes=event.notes)
                return embed_pb2.EmbedResponse(done=done)
        return None


def embed_message(model: str, request: EmbedRequest) -> embed_pb2.EmbedRequest:
    """Convert a request to its message. Arrays become PNG files."""
    images = [file_of(image) for image in request.images]
    number: Any = MATCH_NUMBERS[request.match]
    return embed_pb2.EmbedRequest(model=model, texts=request.texts, images=images, match=number)


def embed_events(responses: Iterator[embed_pb2.EmbedResponse]) -> Generator[Event, None, None]:
    """The events of a stream of EmbedService.Embed."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield queued_event(response.queued)
            case "embeddings":
                found = response.embeddings
                yield Embeddings(_array(found.texts), _array(found.images), found.prompt_tokens)
            case "scores":
                yield Scores(_array(response.scores.scores))
            case "done":
                yield done_event(response.done)


def _message(array: NDArray[np.float32]) -> embed_pb2.FloatArray:
    return embed_pb2.FloatArray(values=array.ravel(), shape=array.shape)


def _array(message: embed_pb2.FloatArray) -> NDArray[np.float32]:
    return np.array(message.values, np.float32).reshape(tuple(message.shape))


TASK: Final = GrpcTask(
    EmbedRequest.task,
    embed_pb2.DESCRIPTOR.services_by_name["EmbedService"],
    embed_request,
    EmbedStream,
    embed_message,
    embed_events,
    model_pb2.MODEL_KIND_EMBED,
)
