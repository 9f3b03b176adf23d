"""Who can be scored: a bundle on a target, run by its own pipeline, and a checkpoint, run by its own library in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from calibration.ground import machine
from calibration.requests.exams import Exam, find
from profiles.exam import Subject
from profiles.task import ProfileTask, TaskExam, profile_tasks
from runtime.bundle.manifest import Bundle
from runtime.engine import Options
from runtime.errors import BundleError, NotFound, SourceError
from runtime.placing.loading import LoadedModel, load_model

Additions = Mapping[str, Mapping[str, Path]]
NONE: Final[Additions] = {}


def exam_of(source: Path | None, bundles: Sequence[Path], ability: str = "") -> Exam:
    """The exam of the checkpoint that all of them are of, with this ability. Raises NotFound when there is none."""
    return find([Bundle(root).manifest.source.fingerprint for root in bundles], source, ability)


def task_of(source: Path | None, bundles: Sequence[Path]) -> str:
    """The task of all of them. Raises BundleError when there are several, and what `source_subject` raises."""
    found = {Bundle(root).manifest.task for root in bundles}
    if source is not None:
        found.add(_reader(source).task)
    if len(found) != 1:
        raise BundleError(f"these are models of the tasks {', '.join(sorted(found))}, expected one of them at a time")
    return found.pop()


def subjects(
    source: Path | None, bundles: Sequence[Path], targets: Sequence[str], options: Options, additions: Additions = NONE
) -> Iterator[Subject]:
    """The source with its additions, then each bundle on each target (all it was built for if none is named), each
    loaded only while it is scored.
    """
    if source is not None:
        yield source_subject(source, additions)
    for root in bundles:
        for target in targets or Bundle(root).targets:
            model = load_model(root, target, options)
            try:
                yield bundle_subject(model)
            finally:
                model.close()


def bundle_subject(model: LoadedModel) -> Subject:
    """A bundle on the target it was loaded for. Raises BundleError where its task has no exams."""
    return Subject(
        machine.program(),
        model.bundle.name,
        model.bundle.manifest.quant,
        model.target,
        model.device,
        partial(task_exam(model.task).results, model),
    )


def source_subject(folder: Path, additions: Additions = NONE) -> Subject:
    """The checkpoint itself, in float32 on the CPU with its own library. Raises NotFound or SourceError."""
    return task_exam(_reader(folder).task).source(folder, additions)


def task_exam(task: str) -> TaskExam:
    """How models of that task take exams. Raises BundleError where they take none."""
    found = profile_tasks()[task].exam
    if found is None:
        raise BundleError(f"models of the task {task} take no exam: measure them with `enginecast bench`")
    return found


def _reader(folder: Path) -> ProfileTask:
    """The task of a checkpoint."""
    if not folder.is_dir():
        raise NotFound(f"source {folder} does not exist: expected a checkpoint folder, such as samples/shapes-vlm")
    for task in profile_tasks().values():
        if task.exam and task.exam.reads(folder):
            return task
    raise SourceError(
        f"{folder} has neither model_index.json (diffusers) nor config.json (transformers): no checkpoint to score"
    )
