"""What pipelines are run on to calibrate them, and the capture of their submodels' inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count, islice
from typing import Any, Final

import numpy as np

from calibration.questions import draw_scene, scene_questions
from calibration.scenes import held_out, picture_scenes, render
from runtime.errors import InvalidInput
from runtime.loading import LoadedModel
from runtime.pipeline import Call, ImageReady, Outputs, Pipeline, drive
from runtime.pipelines.chat import ChatRequest
from runtime.pipelines.diffusion import ImageRequest
from runtime.signature import Array
from runtime.text import Message

VAE_ENCODER: Final = "vae_encoder"
SAMPLES: Final = 24
"""Calls kept of each submodel."""
REQUESTS: Final = 8
TRIES: Final = 4
"""Requests tried for each one wanted."""
STEPS: Final = 12
MAX_TOKENS: Final = 24

PROMPTS: Final = (
    "a photograph of an old lighthouse on a cliff at sunset, waves below",
    "portrait of an elderly fisherman in a yellow raincoat, soft light",
    "a bowl of ripe oranges on a wooden table, oil painting",
    "a crowded street market at night in the rain, neon reflections",
    "a watercolour of snowy mountains behind a frozen lake",
    "a small red bicycle leaning against a white brick wall",
    "an isometric drawing of a tidy workshop with many tools",
    "close-up of a green frog on a leaf, macro photography",
)
"""Prompts of general models: people, places, things, and several styles."""


def image_requests(seed: int = 0) -> Iterator[ImageRequest]:
    """Pictures to draw, without end: scenes of coloured shapes and general prompts in turn, each with its own seed. None is held out."""
    rng = np.random.default_rng(seed)
    captions = [scene.caption for scene in picture_scenes() if not held_out(scene.caption)]
    for i in count():
        prompt = PROMPTS[i // 2 % len(PROMPTS)] if i % 2 else captions[rng.integers(len(captions))]
        yield ImageRequest(prompt=prompt, steps=STEPS, seed=seed + i)


def chat_requests(seed: int = 0) -> Iterator[ChatRequest]:
    """Questions about drawn scenes, without end, none of them held out, answered greedily."""
    rng = np.random.default_rng(seed)
    while True:
        scene = draw_scene(rng)
        questions = scene_questions(scene, rng)
        question = questions[rng.integers(len(questions))]
        message = Message("user", (render(scene, rng), question.text))
        yield ChatRequest(messages=(message,), max_tokens=MAX_TOKENS, temperature=0.0, seed=seed)


def accepted(pipeline: Callable[[Any], Pipeline], requests: Iterable[ImageRequest | ChatRequest], wanted: int) -> Iterator[Pipeline]:
    """The first `wanted` requests that a model can read, ready to be driven. Raises what the model raised when it reads none of TRIES.

    A prompt may be too long for a small model's tokenizer, or a picture too many for its context.
    """
    found = 0
    refusal: InvalidInput | None = None
    for request in islice(requests, TRIES * wanted):
        try:
            ready = pipeline(request)
        except InvalidInput as error:
            refusal = error
            continue
        yield ready
        found += 1
        if found == wanted:
            return
    if not found and refusal is not None:
        raise refusal


def capture(model: LoadedModel, limit: int = SAMPLES, seed: int = 0) -> dict[str, list[dict[str, Array]]]:
    """Run a float model on the built-in requests of its kind; the inputs that each submodel got, at most `limit` calls of each.

    No pipeline encodes pictures into latents, so a model that draws has its own pictures offered to its VAE encoder.
    """
    sample = Sample([submodel.name for submodel in model.bundle.manifest.submodels], limit, seed)
    requests = image_requests(seed) if model.kind == "diffusion" else chat_requests(seed)
    for pipeline in accepted(model.pipeline, requests, REQUESTS):
        for event in drive(sample.watch(pipeline), model.engines):
            if isinstance(event, ImageReady):
                sample.offer(Call(VAE_ENCODER, {"image": _pixels(event.image)}))
    return sample.kept


def _pixels(image: Array) -> Array:
    """uint8 RGB [height, width, 3] as the VAE takes it: float32 [1, 3, height, width] in -1..1."""
    return np.ascontiguousarray((image.astype(np.float32) / np.float32(127.5) - 1).transpose(2, 0, 1)[None])


class Sample:
    """Inputs of each submodel: at most `limit` calls, every call as likely to be kept as any other, the same ones for the same seed.

    Reservoir sampling (Vitter 1985, algorithm R): memory is that of the calls kept, however many are seen. Calls with a slot are left out:
    their states live in the engine.
    """

    def __init__(self, submodels: Collection[str], limit: int = SAMPLES, seed: int = 0) -> None:
        self.kept: dict[str, list[dict[str, Array]]] = {name: [] for name in submodels}
        self._seen = dict.fromkeys(submodels, 0)
        self._limit = limit
        self._rng = {name: np.random.default_rng([seed, i]) for i, name in enumerate(sorted(submodels))}

    def watch(self, pipeline: Pipeline) -> Pipeline:
        """The same pipeline, its calls offered to the sample."""
        outputs: Outputs | None = None
        try:
            while True:
                item = pipeline.send(outputs)
                if isinstance(item, Call):
                    self.offer(item)
                outputs = yield item
        except StopIteration:
            return
        finally:
            pipeline.close()

    def offer(self, call: Call) -> None:
        """Keep a copy of the call's inputs, or not."""
        if call.submodel not in self.kept or call.slot is not None:
            return
        kept, seen = self.kept[call.submodel], self._seen[call.submodel]
        self._seen[call.submodel] += 1
        place = seen if seen < self._limit else int(self._rng[call.submodel].integers(seen + 1))
        if place < self._limit:
            copy = {name: np.array(array) for name, array in call.inputs.items()}
            kept[place : place + 1] = [copy]
