"""The build: from a checkpoint to a bundle. Each step takes what the one before made, and nothing is edited in place.

check weights -> trace -> parity -> [calibrate -> search] -> quantize and write -> compile -> [quality] -> bundle
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import onnx_ir as ir

import export.graph.trace
from calibration.ground.progress import each, phase
from calibration.observe.half import HalfCompute, store
from calibration.quantize.plan import LayerPlan, plan
from calibration.quantize.tuning import Tuning
from calibration.requests.exams import Exam, exam_of
from export.architecture.twin import twin_weights
from export.build import auto
from export.build.auto import Plans
from export.build.keys import code
from export.build.learned import captured, compensated, floating_model, tuned
from export.build.options import Options
from export.build.staging import cached, key_of, staging
from export.build.state import Build, finish, part_graph, place
from export.checkpoint.source import check_finite
from export.checks import parity
from export.family import Part
from export.finished.agreement import Reference, agree, summary
from export.finished.artifacts import remove_graphs
from export.graph import weights as graph
from export.report.baseline import compare_speed
from export.report.compare import measure, right
from export.report.progress import Listener, Progress
from export.report.quality import Quality, save_quality
from export.task import Pictures
from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, Parity, Submodel, Verdict
from runtime.engine import CompileOptions, Engine, target
from runtime.errors import BundleError, InvalidInput, NotFound, QualityError, ResourceExhausted
from runtime.placing.loading import load_model

M_MMAP_THRESHOLD: Final = -3


def build(options: Options, listen: Listener = lambda report: None) -> tuple[Bundle, dict[str, float]]:
    """Build a bundle; return it and the seconds that each stage took (none when it was there already, finished by the
    same build).

    Raises InvalidInput, SourceError, ParityError, EngineError or ResourceExhausted; `options.output` is then as it was.
    """
    options.check()
    state = Build.open(options)
    existing = _existing(options.output)
    if existing is not None and existing.manifest.key == state.key:
        try:
            existing.verify()
            return existing, {}
        except BundleError:
            if not options.force:
                raise
    _check_room(options.output, state.least_bytes())
    _return_freed_memory()
    progress = Progress(state.steps(), listen)
    with staging(options.output, options.force) as folder:
        _fill(state, folder, progress)
    return Bundle(options.output), progress.timings


def _check_room(output: Path, need: int) -> None:
    """Raise ResourceExhausted when the disk of `output` has not even room for the bundle's weights."""
    free = shutil.disk_usage(next(folder for folder in output.absolute().parents if folder.exists())).free
    if need > free:
        raise ResourceExhausted(
            f"{output} needs at least {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: free some space or choose "
            "another --output"
        )


def _return_freed_memory() -> None:
    """From now on, blocks of a megabyte and more go back to the system once freed (mallopt(3), where the C library has
    it).

    glibc would raise that limit to 32 MB and keep freed layers: with Stable Diffusion's, half a gigabyte more at the
    peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _fill(state: Build, folder: Path, progress: Progress) -> None:
    with progress.step("weights", "check") as notes:
        for checkpoint in each("component", state.checkpoints.values()):
            check_finite(checkpoint.tensors)
        notes += [f"{state.nbytes / 1e9:.2f} GB", *state.refused]
    graphs, parities = {}, {}
    for part in state.parts:
        with progress.step(part.name, "trace") as notes:
            graphs[part.name] = part_graph(state, part)
            notes.append(f"{sum(1 for _ in graphs[part.name].graph)} nodes")
        with progress.step(part.name, "parity") as notes:
            parities[part.name] = _parity(state, part)
            notes.append(f"{parities[part.name].method}, error {parities[part.name].error:.1e}")
    _check_quantized(state, graphs)
    tunings: dict[str, Tuning] = {}
    if any(map(state.calibrated, state.parts)):
        with progress.step("pipeline", "calibrate") as notes:
            samples = captured(state, folder)
            notes += [
                ", ".join(f"{len(calls)} of {name}" for name, calls in samples.samples.items()),
                *samples.warnings(),
            ]
        for part in filter(state.calibrated, state.parts):
            with progress.step(part.name, "tune") as notes:
                tuning = tuned(state, part, samples)
                notes.append(f"{len(tuning.ranges)} ranges, {len(tuning.folds)} folds")
            if state.compensated(part):
                with progress.step(part.name, "compensate") as notes:
                    tuning = compensated(state, part, tuning, samples.samples[part.name])
                    notes.append(f"{len(tuning.compensated)} weights")
            tunings[part.name] = tuning
            graphs[part.name] = tuning.folded(graphs[part.name])
    searched = state.options.quant == "auto"
    plans = _search(state, graphs, tunings, folder, progress) if searched else _plans(state, graphs, tunings)
    submodels = []
    for part in state.parts:
        with progress.step(part.name, "write") as notes:
            chosen, model = state.recipe(part), graphs.pop(part.name)
            if chosen is not None and chosen.half:
                model = store(model, chosen.half)
            submodel = _write(part, model, plans.get(part.name), tunings.get(part.name), folder, state.requested(part))
            notes.append(f"{submodel.nbytes / 1e6:.1f} MB {submodel.precision}")
            if "int4" in submodel.precision.weights and not tunings.get(part.name, Tuning()).codes and not searched:
                notes.append("rounded without data: a set of `enginecast calibrate` makes it better")
            half = state.half(part)
            if half is not None:
                found = HalfCompute.measure(
                    folder / submodel.graph, half, captured(state, folder).samples[part.name], part_graph(state, part)
                )
                submodel = submodel.computing(found.compute, tuple(found.keep))
                notes.append(
                    found.reason
                    or f"computes in {found.compute} at {found.snr_db:.1f} dB, {len(found.keep)} nodes in float32"
                )
            submodels.append(submodel.model_copy(update={"parity": parities[part.name]}))
    artifacts = []
    for name in state.options.targets:
        for submodel in submodels:
            with progress.step(submodel.name, f"compile {name}"):
                options = CompileOptions(state.options.settings.get(name, {}), progress.compiling)
                artifacts.append(_compile(target(name), submodel, folder, options))
    if state.checked:
        artifacts = _agreed(state, folder, submodels, artifacts, progress)
    verdict = _judged(state, folder, submodels, artifacts, progress) if state.measured else None
    if state.options.strip_canonical:
        remove_graphs(folder, submodels, artifacts)
    with progress.step("bundle", "hash"):
        finish(state, folder, submodels, artifacts, verdict=verdict)


def _check_quantized(state: Build, graphs: Mapping[str, ir.Model]) -> None:
    """Raises InvalidInput where the recipe would leave every weight of the model as it is, with the reasons."""
    recipes = {part.name: chosen for part in state.parts if (chosen := state.recipe(part)) and not chosen.half}
    plans = [planned for name, chosen in recipes.items() for planned in plan(graphs[name], chosen)]
    if not recipes or state.options.quant == "auto" or any(planned.weight_type != "float" for planned in plans):
        return
    counted = Counter(planned.reason.partition(":")[0] for planned in plans).most_common()
    reasons = "; ".join(f"{count} layers: {reason}" for reason, count in counted) or "it has no layers with weights"
    raise InvalidInput(
        "quant",
        f"is {state.options.quant}, and no weight of {state.name} can be quantized ({reasons}): build it with --quant "
        "none or fp16",
    )


def _parity(state: Build, part: Part) -> Parity:
    """Compare once for the same weights, graph and versions."""

    def compare(path: Path) -> None:
        found = []
        if state.method == "full":
            found.append(parity.check(part, part_graph(state, part), state.weights(part), "full"))
        if state.method == "twin" or parity.beyond_reach(part.signature):
            found.append(_twin_parity(state, part))
        path.write_text(parity.worst(found).model_copy(update={"method": state.method}).model_dump_json())

    key = key_of("parity", state.fingerprint, part.name, part.floor, state.method, state.tools, code())
    return Parity.model_validate_json(cached(key, ".json", compare).read_bytes())


def _twin_parity(state: Build, part: Part) -> Parity:
    twin = next(other for other in state.family.parts(state.source, True) if other.name == part.name)
    with twin_weights(twin) as weights:
        model = export.graph.trace.trace(twin.module, twin.signature)
        graph.attach(model, twin.parameters(), weights)
        return parity.check(twin, model, weights, "twin")


def _agreed(
    state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress
) -> list[Artifact]:
    """The artifacts, each compared with its canonical graph where that can be done here."""
    calls = captured(state, folder).samples if any(map(state.calibrated, state.parts)) else {}
    finish(state, folder, submodels, artifacts)  # a manifest for now, as engines may read it
    references = {one.name: Reference(one, folder, calls.get(one.name, ())) for one in submodels}
    found = []
    for artifact in artifacts:
        with progress.step(artifact.submodel, f"check {artifact.target}") as notes:
            found.append(agree(target(artifact.target), references[artifact.submodel], artifact))
            notes.append(summary(found[-1]))
    (folder / MANIFEST).unlink()
    return found


def _judged(
    state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress
) -> Verdict:
    """Measure quality, and speed where that is asked for, and store both in the bundle."""
    assert state.judge is not None
    judges = (
        []
        if state.judge in state.options.targets
        else [_compile(target(state.judge), one, folder) for one in submodels]
    )
    finish(state, folder, submodels, [*artifacts, *judges])  # a manifest for now, so that the model can be loaded
    with progress.step("pipeline", "quality") as notes:
        quality, pictures = _quality(state, folder, progress)
        verdict = Verdict(figures=quality.summary(), shortfalls=tuple(quality.shortfalls(state.options.quant)))
        notes.append("; ".join(verdict.shortfalls) or "every floor held")
    if state.timed:
        with progress.step("pipeline", "speed"), ExitStack() as stack:
            with phase(0.0, 0.5):
                floating = stack.enter_context(floating_bundle(state, folder))
            with phase(0.5, 1.0):
                speed = compare_speed(folder, floating, state.new_parts(), state.weights)
            quality = quality.model_copy(update={"speed": speed})
    if judges:
        shutil.rmtree(folder / "engines" / state.judge, ignore_errors=True)
    (folder / MANIFEST).unlink()
    save_quality(folder, quality, pictures)
    return verdict


def _quality(state: Build, folder: Path, progress: Progress) -> tuple[Quality, Pictures]:
    """Compare the quantized model with the float one. Raises QualityError when it falls below a floor and that is not
    allowed.
    """
    samples = captured(state, folder)
    with closing(load_model(folder, state.judge)) as quantized, floating_model(state, folder) as reference:
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
def floating_bundle(state: Build, folder: Path) -> Iterator[Path]:
    """The float model as a bundle for the same targets, in a folder of its own inside `folder` meanwhile: what speed is
    compared with.
    """
    root = folder / "float"
    root.mkdir()
    try:
        submodels = [_write(part, part_graph(state, part), None, None, root) for part in state.parts]
        artifacts = [
            _compile(target(name), submodel, root)
            for name in state.options.targets
            for submodel in each("compiling", submodels)
        ]
        finish(state, root, submodels, artifacts, quant="none")
        yield root
    finally:
        shutil.rmtree(root)


def _plans(state: Build, graphs: Mapping[str, ir.Model], tunings: Mapping[str, Tuning]) -> Plans:
    """What the recipe makes of each part; nothing without one."""
    recipes = {part.name: state.recipe(part) for part in state.parts}
    return {
        name: tunings.get(name, Tuning()).plan(graphs[name], found)
        for name, found in recipes.items()
        if found is not None
    }


def _search(
    state: Build, graphs: Mapping[str, ir.Model], tunings: Mapping[str, Tuning], folder: Path, progress: Progress
) -> Plans:
    """The plans of the search, which is written into the bundle."""
    samples, found = captured(state, folder).samples, {}
    key = key_of("auto", state.fingerprint, state.calibration_key, state.versions, code())
    for part in state.parts:
        with progress.step(part.name, "explore") as notes:
            tuning, calls = tunings.get(part.name, Tuning()), samples[part.name]
            explored = auto.Submodel.explore(
                graphs[part.name],
                part.activations,
                tuning,
                calls,
                state.options.goal,
                state.size(part),
                key_of(key, part.name),
            )
            found[part.name] = explored
            notes.append(
                f"noises {explored.how.method} in {explored.how.runs} runs, {len(explored.assignments)} assignments "
                "worth having"
            )
    with progress.step("pipeline", "search") as notes, ExitStack() as stack:
        exam = exam_of(state.fingerprint)
        trials = None
        if exam is not None:
            judge = _examiner(state, exam, graphs, tunings, folder)
            trials = stack.enter_context(closing(auto.Exam(judge, key)))
        plans, tried = auto.search(found, state.options.goal, state.options.max_drop, trials)
        (folder / auto.FILE).write_text(tried.model_dump_json(indent=1))
        notes.append(f"{len(tried.points)} tried, {tried.claim}")
    return plans


def _examiner(
    state: Build, exam: Exam, graphs: Mapping[str, ir.Model], tunings: Mapping[str, Tuning], folder: Path
) -> auto.Judge:
    """What the model of some plans, or the float model, does right of the exam's cases that are not held out."""
    trial = folder / "trial"

    def judge(plans: Plans | None, first: int) -> Generator[bool, None, None]:
        if plans is None:
            with floating_model(state, folder) as model:
                yield from right(model, exam, auto.CASES, held=False, seed=1, first=first)
            return
        submodels = [
            _write(part, graphs[part.name], plans[part.name], tunings.get(part.name), trial) for part in state.parts
        ]
        try:
            finish(
                state, trial, submodels, [_compile(target("onnxruntime"), submodel, trial) for submodel in submodels]
            )
            with closing(load_model(trial, "onnxruntime")) as model:
                yield from right(model, exam, auto.CASES, held=False, seed=1, first=first)
        finally:
            shutil.rmtree(trial)

    return judge


def _write(
    part: Part,
    model: ir.Model,
    plans: Sequence[LayerPlan] | None,
    tuning: Tuning | None,
    folder: Path,
    requested: tuple[str, str] | None = None,
) -> Submodel:
    """Quantize as planned, if at all, and write one graph with its weights.

    `requested` is the form that weights should take, and why those do not whose plans give no reason: the manifest then
    says what they did.
    """
    tuning, folded = tuning or Tuning(), model
    if plans is not None:
        model = tuning.quantize(folded, plans)
    weights = graph.weights_of(model, folded, plans or (), *requested) if requested else ()
    nbytes = graph.write(model, folder / "onnx" / part.name)
    return Submodel(
        name=part.name,
        signature=part.signature,
        graph=place(part.name),
        precision=graph.precision(model),
        nbytes=nbytes,
        dynamic=any(planned.dynamic for planned in plans or ()),
        bfloat16=tuning.bfloat16(plans or ()),
        activation_ranges=tuning.activation_ranges(folded, plans or ()),
        weights=weights,
    )


def _compile(engine: type[Engine], submodel: Submodel, folder: Path, options: CompileOptions | None = None) -> Artifact:
    return engine.compile_with(
        options or CompileOptions(), submodel, folder / submodel.graph, folder / "engines" / engine.target
    )


def _existing(output: Path) -> Bundle | None:
    """What an earlier build left at the output, if it can be read."""
    try:
        return Bundle(output)
    except (BundleError, NotFound):
        return None
