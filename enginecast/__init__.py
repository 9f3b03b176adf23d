"""Builds diffusion and vision-language models into bundles of compiled engines, and runs them.

    import enginecast

    # Build a bundle. Needs the extra "export".
    enginecast.build("./my-checkpoint", "bundles/mine", quant="int8")

    # Run it in this process.
    with enginecast.load("bundles/mine") as model:
        model.generate("a red fox in the snow", steps=20).save("fox.png")

    # Or call a server that has it.
    with enginecast.Client("127.0.0.1:50051", model="mine") as client:
        client.generate("a red fox in the snow", steps=20).save("fox.png")

`Model` and `Client` have the same methods. They wait for a result, yield its events, or work with asyncio: see
`Stream`. All errors that are raised on purpose are subclasses of `EnginecastError`.
"""

from __future__ import annotations

from enginecast.building import BuildOptions, build
from runtime.bundle.manifest import Bundle
from runtime.diffusion.hires import Hires
from runtime.errors import (
    BundleError,
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    EnginecastError,
    EngineError,
    EngineUnavailable,
    InvalidInput,
    MissingDependency,
    NotFound,
    ParityError,
    PermissionDenied,
    QualityError,
    ResourceExhausted,
    ScriptError,
    SourceError,
    Unauthenticated,
    Unavailable,
    UnsupportedModel,
)
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import Finished, TextDelta
from runtime.tasks.embed import Embeddings, EmbedRequest, Scores
from runtime.tasks.image import ImageReady
from serving.dialects.python.client import Client
from serving.dialects.python.grid import GridDrawing
from serving.dialects.python.model import Model, load
from serving.dialects.python.requests import ChatOptions, Control, ImageOptions, Message, PictureLike, Style
from serving.dialects.python.results import Answer, Choice, Drawing, Matching, Vectors
from serving.dialects.python.session import Session
from serving.dialects.python.stream import Stream
from serving.host.job import Done, EngineUse, Queued, Started

__all__ = [
    "Answer",
    "BuildOptions",
    "Bundle",
    "BundleError",
    "Cancelled",
    "ChatOptions",
    "Choice",
    "Client",
    "ContextLengthExceeded",
    "Control",
    "DeadlineExceeded",
    "Done",
    "Drawing",
    "EmbedRequest",
    "Embeddings",
    "EngineError",
    "EngineUnavailable",
    "EngineUse",
    "EnginecastError",
    "Event",
    "Finished",
    "Grammar",
    "GridDrawing",
    "Hires",
    "ImageOptions",
    "ImageReady",
    "InvalidInput",
    "Matching",
    "Message",
    "MissingDependency",
    "Model",
    "NotFound",
    "ParityError",
    "PermissionDenied",
    "PictureLike",
    "Progress",
    "QualityError",
    "Queued",
    "ResourceExhausted",
    "Scores",
    "ScriptError",
    "Session",
    "SourceError",
    "Started",
    "Stream",
    "Style",
    "TextDelta",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "UnsupportedModel",
    "Vectors",
    "build",
    "load",
]
