"""How well a model does the sample task: pictures drawn right, or questions answered right, of held-out cases that a program can check.

Every subject, a bundle on a target or the source checkpoint in plain diffusers or transformers, gets the same cases, and pictures start
from the same noise: that of `runtime.pipelines.diffusion.random_stream` with the case's number as seed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table

from calibration.questions import Case, test_questions
from calibration.scenes import Scene, test_prompts
from calibration.scoring import score_answer, score_picture
from profiles import machine
from profiles.rows import Row, Spread
from runtime.bundle import Bundle, Frozen
from runtime.engine import Options
from runtime.errors import BundleError, NotFound, SourceError
from runtime.loading import LoadedModel, load_model
from runtime.optional import require
from runtime.pipeline import Call, Engines, Event, ImageReady, Outputs, Pipeline, TextDelta, drive
from runtime.pipelines.chat import ChatRequest
from runtime.pipelines.diffusion import ImageRequest, random_stream
from runtime.signature import BATCH
from runtime.text import Message

T = TypeVar("T")
Kind = Literal["diffusion", "chat"]
Pixels = NDArray[np.uint8]
ATTRIBUTES: Final = ("background", "missing", "extra", "size", "colour", "shape")
"""In what a picture can be wrong, as `calibration.scoring` names it."""
COUNTS: Final[dict[Kind, int]] = {"diffusion": 500, "chat": 1000}


class Exam(Frozen):
    """What is asked. `count` cases; steps and guidance of pictures are those the sample was trained to be drawn with."""

    count: int = Field(ge=1)
    steps: int = Field(default=20, ge=1)
    guidance_scale: float = Field(default=3.0, ge=0)
    batch: int = Field(default=16, ge=1, le=BATCH.max // 2)
    """Pictures drawn together; with guidance each takes two rows of a batch."""


@dataclass(frozen=True)
class Scores:
    """Percent right: of all cases, and by part, which is an attribute of pictures or a kind of question."""

    right: float
    parts: dict[str, float]
    count: int
    seconds: float


@dataclass(frozen=True)
class Subject:
    """Who sits the exam: a bundle on a target, or a checkpoint, whose target is "torch". Only what its `kind` can do is asked of it."""

    program: str
    name: str
    quant: str
    target: str
    device: str
    kind: Kind
    pictures: Callable[[Sequence[Scene], Exam], Iterable[Pixels]]
    answers: Callable[[Sequence[Case], Exam], Iterable[str]]


def score(subject: Subject, exam: Exam, tick: Callable[[], None] = lambda: None) -> Scores:
    """Ask all cases; `tick` is called after each. Raises what the subject raises."""
    start = time.perf_counter()
    if subject.kind == "diffusion":
        scenes = test_prompts(exam.count)
        wrongs = [
            score_picture(picture, scene).wrong
            for picture, scene in _ticking(zip(subject.pictures(scenes, exam), scenes, strict=True), tick)
        ]
        seconds = time.perf_counter() - start
        faults = Counter(name for wrong in wrongs for name in set(wrong))
        parts = {name: 100 * (1 - faults[name] / len(wrongs)) for name in ATTRIBUTES}
        return Scores(100 * sum(not wrong for wrong in wrongs) / len(wrongs), parts, len(wrongs), seconds)
    cases = test_questions(exam.count)
    right = [
        (case.kind, score_answer(said, case.answer)) for said, case in _ticking(zip(subject.answers(cases, exam), cases, strict=True), tick)
    ]
    seconds = time.perf_counter() - start
    asked, known = Counter(kind for kind, _ in right), Counter(kind for kind, good in right if good)
    return Scores(100 * known.total() / len(right), {kind: 100 * known[kind] / asked[kind] for kind in asked}, len(right), seconds)


def _ticking(items: Iterable[T], tick: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        tick()


def bundle_subject(model: LoadedModel) -> Subject:
    """A bundle on the target it was loaded for."""

    def pictures(scenes: Sequence[Scene], exam: Exam) -> Iterator[Pixels]:
        for some in _batches(list(enumerate(scenes)), exam.batch):
            requests = [
                ImageRequest(scene.caption, steps=exam.steps, guidance_scale=exam.guidance_scale, seed=seed) for seed, scene in some
            ]
            for events in drive_together([model.pipeline(request) for request in requests], model.engines):
                yield from (event.image.astype(np.uint8, copy=False) for event in events if isinstance(event, ImageReady))

    def answers(cases: Sequence[Case], exam: Exam) -> Iterator[str]:
        for case in cases:
            request = ChatRequest((Message("user", (case.picture, case.question)),), temperature=0.0)
            yield "".join(event.text for event in drive(model.pipeline(request), model.engines) if isinstance(event, TextDelta))

    manifest = model.bundle.manifest
    return Subject(machine.program(), model.bundle.name, manifest.quant, model.target, model.device, model.kind, pictures, answers)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def drive_together(pipelines: Sequence[Pipeline], engines: Engines) -> list[list[Event]]:
    """Run pipelines in step, stacking their calls to the same submodel where shapes fit; the events of each. No call may have a slot."""
    events: list[list[Event]] = [[] for _ in pipelines]
    waiting: dict[int, Call] = {}

    def advance(number: int, outputs: Outputs | None) -> None:
        try:
            item = pipelines[number].send(outputs)
            while not isinstance(item, Call):
                events[number].append(item)
                item = next(pipelines[number])
        except StopIteration:
            return
        waiting[number] = item

    for number in range(len(pipelines)):
        advance(number, None)
    while waiting:
        first = next(iter(waiting.values()))
        group = [number for number, call in waiting.items() if _stackable(call, first)]
        for number, outputs in zip(group, _run_stacked(engines, [waiting.pop(number) for number in group]), strict=True):
            advance(number, outputs)
    return events


def _stackable(call: Call, other: Call) -> bool:
    def shapes(of: Call) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in of.inputs.items()}

    return call.submodel == other.submodel and shapes(call) == shapes(other)


def _run_stacked(engines: Engines, calls: Sequence[Call]) -> list[Outputs]:
    assert all(call.slot is None for call in calls), "a slot's states belong to one sequence"
    stacked = {name: np.concatenate([call.inputs[name] for call in calls]) for name in calls[0].inputs}
    outputs = engines[calls[0].submodel].run(stacked)
    parts = {name: np.split(array, len(calls)) for name, array in outputs.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(calls))]


def source_subject(folder: Path) -> Subject:
    """The checkpoint itself, in float32 on the CPU with plain diffusers or transformers. Raises NotFound or SourceError."""
    if not folder.is_dir():
        raise NotFound(f"source {folder} does not exist: expected a checkpoint folder, such as export/samples/shapes-vlm")
    if (folder / "model_index.json").is_file():
        return _diffusers_subject(folder)
    if (folder / "config.json").is_file():
        return _transformers_subject(folder)
    raise SourceError(f"{folder} has neither model_index.json (diffusers) nor config.json (transformers): no checkpoint to score")


def _diffusers_subject(folder: Path) -> Subject:
    torch, diffusers = require("torch", "export"), require("diffusers", "export")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
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
                images=[case.picture for case in some], text=[prompt(case) for case in some], padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                tokens = model.generate(**inputs, do_sample=False)
            yield from processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return Subject(_version("transformers"), folder.name, "none", "torch", "cpu", "chat", _nothing, answers)


def _version(package: str) -> str:
    return f"{package} {machine.version(package)}"


def _nothing(cases: Sequence[Any], exam: Exam) -> Iterator[Any]:
    raise AssertionError("a subject is only asked what its kind can do")


def subjects(source: Path | None, bundles: Sequence[Path], targets: Sequence[str], options: Options) -> Iterator[Subject]:
    """The source, then each bundle on each target (all it was built for if none is named), each loaded only while it is scored."""
    if source is not None:
        yield source_subject(source)
    for root in bundles:
        for target in targets or Bundle(root).targets:
            model = load_model(root, target, options)
            try:
                yield bundle_subject(model)
            finally:
                model.close()


def kind_of(source: Path | None, bundles: Sequence[Path]) -> Kind:
    """What all of them are. Raises BundleError when there are pipelines of both kinds, or of a kind without a task."""
    kinds = {Bundle(root).manifest.pipeline for root in bundles}
    if source is not None:
        kinds.add("diffusion" if (source / "model_index.json").is_file() else "chat")
    if len(kinds) != 1 or not kinds <= set(COUNTS):
        raise BundleError(f"these are models of the kinds {', '.join(sorted(kinds))}, expected one of {', '.join(COUNTS)} at a time")
    return "diffusion" if "diffusion" in kinds else "chat"


def rows(subject: Subject, exam: Exam, scores: Scores, threads: int) -> list[Row]:
    """The scores for storing: `right` for all attributes or questions, `right.PART` for each part."""
    asked: dict[str, int | float | str] = {"count": scores.count, "seconds": round(scores.seconds, 1)}
    if subject.kind == "diffusion":
        asked |= {"steps": exam.steps, "guidance_scale": exam.guidance_scale}
    return [
        Row(
            metric=metric,
            unit="%",
            spread=Spread.of([percent]),
            program=subject.program,
            bundle="" if subject.target == "torch" else subject.name,
            source=subject.name,
            quant=subject.quant,
            target=subject.target,
            device=subject.device,
            cpu=machine.cpu_model(),
            threads=threads or machine.threads(),
            settings=asked,
            versions=machine.versions("torch", "diffusers", "transformers") if subject.target == "torch" else machine.versions(),
            date=datetime.now(UTC),
        )
        for metric, percent in {"right": scores.right, **{f"right.{part}": value for part, value in scores.parts.items()}}.items()
    ]


def table(results: Sequence[tuple[Subject, Scores]]) -> Table:
    """A line for each subject; the drop is in points below the first one without quantization."""
    base = next((scores.right for subject, scores in results if subject.quant == "none"), None)
    parts = list(dict.fromkeys(part for _, scores in results for part in scores.parts))
    shown = Table("model", "quant", "target", "right", "drop", *parts, "cases", "seconds")
    for subject, scores in results:
        drop = "" if base is None or subject is results[0][0] else f"{base - scores.right:+.1f}"
        percents = [f"{scores.parts[part]:.1f}" if part in scores.parts else "" for part in parts]
        shown.add_row(
            subject.name,
            subject.quant,
            subject.target,
            f"{scores.right:.1f} %",
            drop,
            *percents,
            str(scores.count),
            f"{scores.seconds:.0f}",
        )
    return shown
