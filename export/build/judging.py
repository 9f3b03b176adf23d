"""What a build finds of its bundle before it is finished: whether targets compute what the graphs say, how near the
quantized model is to the float one, how fast both are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from calibration.ground.progress import each, phase
from export.build.bundle import draft
from export.build.learned import captured, floating_model
from export.build.state import Build, part_graph
from export.build.writing import compiled, write
from export.finished.agreement import Reference, agree, summary
from export.report.baseline import compare_speed
from export.report.compare import measure
from export.report.progress import Progress
from export.report.quality import Quality, save_quality
from export.task import Pictures
from runtime.bundle.manifest import Artifact, Bundle, Submodel, Verdict
from runtime.engine import target
from runtime.errors import QualityError
from runtime.placing.loading import load_model


def agreed(
    state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress
) -> list[Artifact]:
    """The artifacts, each compared with its canonical graph where that can be done here."""
    calls = captured(state, folder).samples if any(map(state.calibrated, state.parts)) else {}
    references = {one.name: Reference(one, folder, calls.get(one.name, ())) for one in submodels}
    found = []
    for artifact in artifacts:
        with progress.step(artifact.submodel, f"check {artifact.target}") as notes:
            found.append(agree(target(artifact.target), references[artifact.submodel], artifact))
            notes.append(summary(found[-1]))
    return found


def judged(
    state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress
) -> Verdict:
    """Measure quality, and speed where that is requested, and store both in the bundle."""
    assert state.judge is not None
    judges = (
        []
        if state.judge in state.options.targets
        else [compiled(target(state.judge), one, folder) for one in submodels]
    )
    quantized = draft(state, folder, submodels, [*artifacts, *judges])
    with progress.step("pipeline", "quality") as notes:
        quality, pictures = _quality(state, quantized)
        verdict = Verdict(figures=quality.summary(), shortfalls=tuple(quality.shortfalls(state.options.quant)))
        notes.append("; ".join(verdict.shortfalls) or "every floor held")
    if state.timed:
        with progress.step("pipeline", "speed"), ExitStack() as stack:
            with phase(0.0, 0.5):
                floating = stack.enter_context(floating_bundle(state, folder))
            with phase(0.5, 1.0):
                speed = compare_speed(quantized, floating, state.new_parts(), state.weights)
            quality = quality.model_copy(update={"speed": speed})
    if judges:
        shutil.rmtree(folder / "engines" / state.judge, ignore_errors=True)
    save_quality(folder, quality, pictures)
    return verdict


def _quality(state: Build, bundle: Bundle) -> tuple[Quality, Pictures]:
    """Compare the quantized model with the float one. Raises QualityError when it falls below a floor and that is not
    allowed.
    """
    samples = captured(state, bundle.root)
    with closing(load_model(bundle, state.judge)) as quantized, floating_model(state, bundle.root) as reference:
        quality, pictures = measure(quantized, reference, samples.samples)
    faults = quality.shortfalls(state.options.quant)
    if faults and not state.options.allow_low_quality:
        raise QualityError(
            f"{state.name} at {state.options.quant} falls below what is worth shipping: {'; '.join(faults)}. No bundle "
            "was written. "
            "Calibrate with more requests like yours (`enginecast calibrate`), choose another --quant, or insist with "
            "--allow-low-quality"
        )
    return quality, pictures


@contextmanager
def floating_bundle(state: Build, folder: Path) -> Iterator[Bundle]:
    """The float model for the same targets, to compare speed with: it lies in a folder of its own inside `folder`
    meanwhile.
    """
    root = folder / "float"
    root.mkdir()
    try:
        submodels = [write(part, part_graph(state, part), None, None, root) for part in state.parts]
        artifacts = [
            compiled(target(name), submodel, root)
            for name in state.options.targets
            for submodel in each("compiling", submodels)
        ]
        yield draft(state, root, submodels, artifacts, quant="none")
    finally:
        shutil.rmtree(root)
