"""Who can be scored: a bundle on a target, run by its own pipeline, and a checkpoint, run by plain diffusers or
transformers in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calibration.ground import machine
from profiles.together import drive_together
from runtime.bundle.manifest import Bundle, Frozen
from runtime.bundle.signature import BATCH
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.latents import random_stream
from runtime.engine import Options
from runtime.errors import BundleError, NotFound, SourceError
from runtime.language.text import Message
from runtime.optional import require
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest, TextDelta
from runtime.tasks.image import ImageDefaults, ImageReady, ImageRequest
from samples.world.questions import Case
from samples.world.scenes import Scene

T = TypeVar("T")
Kind = str
Pixels = NDArray[np.uint8]
COUNTS: Final[dict[Kind, int]] = {"diffusion": 500, "chat": 1000}
"""The kinds there is a task for, and how many cases it has."""


class Exam(Frozen):
    """What is asked: `count` cases, and how pictures are drawn."""

    count: int = Field(ge=1)
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    batch: int = Field(default=16, ge=1, le=BATCH.max // 2)
    """Pictures drawn together; with guidance each takes two rows of a batch."""


@dataclass(frozen=True)
class Subject:
    """Who sits the exam: a bundle on a target, or a checkpoint, whose target is "torch". Only what its `kind` can do is
    asked of it.
    """

    program: str
    name: str
    quant: str
    target: str
    device: str
    kind: Kind
    pictures: Callable[[Sequence[Scene], Exam], Iterable[Pixels]]
    answers: Callable[[Sequence[Case], Exam], Iterable[str]]


def kind_of(source: Path | None, bundles: Sequence[Path]) -> Kind:
    """What all of them are. Raises BundleError when there are pipelines of both kinds, or of a kind without a task."""
    kinds = {Bundle(root).manifest.pipeline for root in bundles}
    if source is not None:
        kinds.add("diffusion" if (source / "model_index.json").is_file() else "chat")
    if len(kinds) != 1 or not kinds <= set(COUNTS):
        raise BundleError(
            f"these are models of the kinds {', '.join(sorted(kinds))}, expected one of {', '.join(COUNTS)} at a time"
        )
    return "diffusion" if "diffusion" in kinds else "chat"


def defaults(source: Path | None, bundles: Sequence[Path]) -> ImageDefaults:
    """How the first of them draws by its own settings: all are asked alike. Raises BundleError or SourceError."""
    if source is not None:
        return ImageDefaults.read(source)
    manifest = Bundle(bundles[0]).manifest
    return DiffusionConfig.parse(manifest.config).defaults if manifest.pipeline == "diffusion" else ImageDefaults()


def subjects(
    source: Path | None, bundles: Sequence[Path], targets: Sequence[str], options: Options
) -> Iterator[Subject]:
    """The source, then each bundle on each target (all it was built for if none is named), each loaded only while it is
    scored.
    """
    if source is not None:
        yield source_subject(source)
    for root in bundles:
        for target in targets or Bundle(root).targets:
            model = load_model(root, target, options)
            try:
                yield bundle_subject(model)
            finally:
                model.close()


def bundle_subject(model: LoadedModel) -> Subject:
    """A bundle on the target it was loaded for."""

    def pictures(scenes: Sequence[Scene], exam: Exam) -> Iterator[Pixels]:
        for some in _batches(list(enumerate(scenes)), exam.batch):
            requests = [
                ImageRequest(scene.caption, steps=exam.steps, guidance_scale=exam.guidance_scale, seed=seed)
                for seed, scene in some
            ]
            for events in drive_together([model.pipeline(request) for request in requests], model.engines):
                yield from (
                    event.image.astype(np.uint8, copy=False) for event in events if isinstance(event, ImageReady)
                )

    def answers(cases: Sequence[Case], exam: Exam) -> Iterator[str]:
        for case in cases:
            request = ChatRequest((Message("user", (case.picture, case.question)),), temperature=0.0)
            yield "".join(
                event.text for event in drive(model.pipeline(request), model.engines) if isinstance(event, TextDelta)
            )

    manifest = model.bundle.manifest
    return Subject(
        machine.program(),
        model.bundle.name,
        manifest.quant,
        model.target,
        model.device,
        manifest.pipeline,
        pictures,
        answers,
    )


def source_subject(folder: Path) -> Subject:
    """The checkpoint itself, in float32 on the CPU with plain diffusers or transformers. Raises NotFound or
    SourceError.
    """
    if not folder.is_dir():
        raise NotFound(f"source {folder} does not exist: expected a checkpoint folder, such as samples/shapes-vlm")
    if (folder / "model_index.json").is_file():
        return _diffusers_subject(folder)
    if (folder / "config.json").is_file():
        return _transformers_subject(folder)
    raise SourceError(
        f"{folder} has neither model_index.json (diffusers) nor config.json (transformers): no checkpoint to score"
    )


def _diffusers_subject(folder: Path) -> Subject:
    torch, diffusers = require("torch", "export"), require("diffusers", "export")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32
    )  # of the class that model_index.json names
    pipeline.watermark = None  # Stable Diffusion XL has one where a package for it is installed
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)

    def pictures(scenes: Sequence[Scene], exam: Exam) -> Iterator[Pixels]:
        for some in _batches(list(enumerate(scenes)), exam.batch):
            noise = np.concatenate([random_stream(seed).standard_normal(shape, np.float32) for seed, _ in some])
            images = pipeline(
                [scene.caption for _, scene in some],
                num_inference_steps=exam.steps,
                guidance_scale=exam.guidance_scale,
                latents=torch.from_numpy(noise),
                output_type="np",
            ).images
            yield from np.round(images * 255).astype(np.uint8)

    return Subject(_version("diffusers"), folder.name, "none", "torch", "cpu", "diffusion", pictures, _nothing)


def _transformers_subject(folder: Path) -> Subject:
    torch, transformers = require("torch", "export"), require("transformers", "export")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # answers begin at the same place

    def prompt(case: Case) -> str:
        content = [{"type": "image"}, {"type": "text", "text": case.question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    def answers(cases: Sequence[Case], exam: Exam) -> Iterator[str]:
        for some in _batches(cases, exam.batch):
            inputs = processor(
                images=[case.picture for case in some],
                text=[prompt(case) for case in some],
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                tokens = model.generate(**inputs, do_sample=False)
            yield from processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return Subject(_version("transformers"), folder.name, "none", "torch", "cpu", "chat", _nothing, answers)


def _version(package: str) -> str:
    return f"{package} {machine.version(package)}"


def _nothing(cases: Sequence[Any], exam: Exam) -> Iterator[Any]:
    raise AssertionError("a subject is only asked what its kind can do")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
