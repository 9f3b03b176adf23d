"""Who can be scored: a bundle on a target, run by its own pipeline, and a checkpoint, run by plain diffusers or
transformers in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from calibration.ground import machine
from calibration.requests.exams import Case, Exam, find
from calibration.requests.task import task_requests
from profiles.together import drive_together
from runtime.bundle.manifest import Bundle, Frozen
from runtime.bundle.signature import BATCH
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.latents import random_stream
from runtime.engine import Options
from runtime.errors import BundleError, NotFound, SourceError
from runtime.optional import require
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageDefaults, ImageRequest
from runtime.vision.images import decoded

T = TypeVar("T")


class Setting(Frozen):
    """How an exam is sat: `count` cases, and how pictures are drawn."""

    count: int = Field(ge=1)
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    batch: int = Field(default=16, ge=1, le=BATCH.max // 2)
    """Pictures drawn together; with guidance each takes two rows of a batch."""


@dataclass(frozen=True)
class Subject:
    """Who sits the exam: a bundle on a target, or a checkpoint, whose target is "torch". `results` gives the result of
    each case in order, as `Case.judge` takes it.
    """

    program: str
    name: str
    quant: str
    target: str
    device: str
    task: str
    results: Callable[[Sequence[Case], Setting], Iterable[Any]]


def exam_of(source: Path | None, bundles: Sequence[Path]) -> Exam:
    """The exam of the checkpoint that all of them are of. Raises NotFound when there is none."""
    return find([Bundle(root).manifest.source.fingerprint for root in bundles], source)


def task_of(source: Path | None, bundles: Sequence[Path]) -> str:
    """The task of all of them. Raises BundleError when there are several."""
    found = {Bundle(root).manifest.task for root in bundles}
    if source is not None:
        found.add("image" if (source / "model_index.json").is_file() else "chat")
    if len(found) != 1:
        raise BundleError(f"these are models of the tasks {', '.join(sorted(found))}, expected one of them at a time")
    return found.pop()


def defaults(source: Path | None, bundles: Sequence[Path]) -> ImageDefaults:
    """How the first of them draws by its own settings: all are asked alike. Raises BundleError or SourceError."""
    if source is not None:
        return ImageDefaults.read(source)
    manifest = Bundle(bundles[0]).manifest
    return DiffusionConfig.parse(manifest.config).defaults if manifest.task == "image" else ImageDefaults()


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

    def pictures(cases: Sequence[Case], setting: Setting) -> Iterator[Any]:
        for some in _batches([_drawn(case, setting) for case in cases], setting.batch):
            for events in drive_together([model.pipeline(request) for request in some], model.engines):
                yield maker.result(events)

    def answers(cases: Sequence[Case], setting: Setting) -> Iterator[Any]:
        for case in cases:
            yield maker.result(drive(model.pipeline(case.request), model.engines))

    maker = task_requests()[model.task]
    manifest = model.bundle.manifest
    return Subject(
        machine.program(),
        model.bundle.name,
        manifest.quant,
        model.target,
        model.device,
        model.task,
        pictures if model.task == "image" else answers,
    )


def _drawn(case: Case, setting: Setting) -> ImageRequest:
    request: ImageRequest = case.request
    return replace(request, steps=setting.steps, guidance_scale=setting.guidance_scale)


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

    def pictures(cases: Sequence[Case], setting: Setting) -> Iterator[Any]:
        for some in _batches([_drawn(case, setting) for case in cases], setting.batch):
            noise = [random_stream(request.seed or 0).standard_normal(shape, np.float32) for request in some]
            images = pipeline(
                [request.prompt for request in some],
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance_scale,
                latents=torch.from_numpy(np.concatenate(noise)),
                output_type="np",
            ).images
            yield from np.round(images * 255).astype(np.uint8)

    return Subject(_version("diffusers"), folder.name, "none", "torch", "cpu", "image", pictures)


def _transformers_subject(folder: Path) -> Subject:
    torch, transformers = require("torch", "export"), require("transformers", "export")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # answers begin at the same place

    def prompt(request: ChatRequest) -> str:
        parts = (part for message in request.messages for part in message.content)
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    def answers(cases: Sequence[Case], setting: Setting) -> Iterator[Any]:
        for some in _batches([case.request for case in cases], setting.batch):
            inputs = processor(
                images=[decoded(picture) for request in some for picture in request.images],
                text=[prompt(request) for request in some],
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                tokens = model.generate(**inputs, do_sample=False)
            yield from processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return Subject(_version("transformers"), folder.name, "none", "torch", "cpu", "chat", answers)


def _version(package: str) -> str:
    return f"{package} {machine.version(package)}"


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
