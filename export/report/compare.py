"""The comparison of a quantized model with the float one, for the report and the floors.

Both models run on the same machine, one request at a time, through the pipelines that users' requests take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calibration.ground.progress import each, phase
from calibration.requests.exams import Exam, exam_of
from calibration.requests.requests import BUILT_IN, NamedRequest, Requests, accepted
from calibration.requests.task import task_requests
from export.report.measured import Compared
from export.report.quality import OutputQuality, Quality, SubmodelQuality, TaskQuality
from export.task import SEED, Comparison, Effort, Pictures, comparisons
from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array
from runtime.errors import BundleError
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel

Samples = Mapping[str, Sequence[Mapping[str, Array]]]
"""Captured inputs of each submodel, one mapping for each call (`CalibrationSet.samples`)."""


def measure(
    quantized: LoadedModel,
    reference: LoadedModel,
    samples: Samples,
    effort: Effort | None = None,
) -> tuple[Quality, Pictures]:
    """Compare a quantized model with the same one before quantization; the pictures are those that the result names.

    `samples` are the inputs to compare each submodel on; of submodels with states, the calls of the answers are
    compared instead. Raises BundleError when the two are not the same model, EngineError when a submodel gives numbers
    that are not finite.
    """
    _check_alike(quantized, reference)
    effort, task = effort or Effort(), comparisons()[reference.task]
    exam = exam_of(reference.bundle.manifest.source.fingerprint)
    pictures: Pictures = {}
    with phase(0.0, 0.3):
        compared = _compare_calls(quantized, reference, samples)
    with phase(0.3, 0.8):
        results: Any = [
            task.compare(i, request, quantized, reference, pictures, compared)
            for i, request in enumerate(each(task.noun, _requests(reference, task, exam, effort)))
        ]
    with phase(0.8, 1.0):
        score = _score(quantized, reference, exam, effort.cases) if exam and effort.cases else None
    quality = Quality(
        quant=quantized.bundle.manifest.quant,
        reference_quant=reference.bundle.manifest.quant,
        target=quantized.target,
        reference_target=reference.target,
        device=quantized.device,
        submodels=tuple(
            _submodel(submodel, reference.bundle.submodel(submodel.name), compared[submodel.name])
            for submodel in quantized.bundle.manifest.submodels
        ),
        task=score,
        results={task.stored: results},
    )
    return quality, pictures


def _check_alike(quantized: LoadedModel, reference: LoadedModel) -> None:
    one, other = quantized.bundle.manifest, reference.bundle.manifest
    names = [[submodel.name for submodel in manifest.submodels] for manifest in (one, other)]
    if (one.pipeline, one.source.fingerprint, names[0]) != (other.pipeline, other.source.fingerprint, names[1]):
        raise BundleError(
            f"bundle {one.name} ({', '.join(names[0])}) and bundle {other.name} ({', '.join(names[1])}) are not of the "
            "same checkpoint: "
            "compare two that were built from one source"
        )


def _compare_calls(quantized: LoadedModel, reference: LoadedModel, samples: Samples) -> dict[str, Compared]:
    """Both engines of each submodel without states on the captured inputs."""
    compared = {submodel.name: Compared() for submodel in quantized.bundle.manifest.submodels}
    for name, found in each("submodel", compared.items()):
        stateless = not quantized.bundle.submodel(name).signature.states
        for inputs in each("call", samples.get(name, ()) if stateless else ()):
            found.add(name, reference.engines[name].run(inputs), quantized.engines[name].run(inputs))
    return compared


def _submodel(quantized: Submodel, reference: Submodel, compared: Compared) -> SubmodelQuality:
    return SubmodelQuality(
        name=quantized.name,
        precision=str(quantized.precision),
        reference_precision=str(reference.precision),
        calls=compared.calls,
        outputs=tuple(
            OutputQuality(name=name, snr_db=one.snr_db, psnr_db=one.psnr_db(), cosine=one.cosine)
            for name, one in compared.outputs.items()
        ),
    )


def _requests(model: LoadedModel, task: Comparison, exam: Exam | None, effort: Effort) -> list[Any]:
    """The first requests that the model accepts, as many as the task compares. Raises the model's error when it accepts
    none.
    """
    wanted = task.wanted(effort)
    every = exam.comparison(wanted, SEED) if exam else task.general()
    prepared = (NamedRequest("", task.comparing(request, i, effort)) for i, request in enumerate(every))

    def ready(one: NamedRequest) -> None:
        model.pipeline(task_requests()[model.task].fitted(model.bundle.manifest.config, one.request)).close()

    return [one.request for one, _ in accepted(ready, Requests(model.task, BUILT_IN, prepared), wanted)]


def _score(quantized: LoadedModel, reference: LoadedModel, exam: Exam, cases: int) -> TaskQuality:
    """Both models on held-out cases, the first of those that `enginecast score` has."""
    judged = [right(model, exam, cases) for model in (reference, quantized)]
    counts = [0, 0]
    for _ in each("case", range(cases)):
        counts = [count + next(done) for count, done in zip(counts, judged, strict=True)]
    return TaskQuality(task=f"held-out {exam.title}", cases=cases, reference_right=counts[0], quantized_right=counts[1])


def right(
    model: LoadedModel, exam: Exam, count: int, held: bool = True, seed: int = 0, first: int = 0
) -> Iterator[bool]:
    """Whether the model does each of `count` cases right, from number `first` on: cases of `enginecast score`, or with
    `held` False cases that are never scored.
    """
    task = task_requests()[model.task]
    for case in exam.cases(count, seed, held)[first:]:
        yield case.judge(task.result(drive(model.pipeline(case.request), model.engines))).right
