"""The build: from a checkpoint to a bundle. Each step takes what the one before made, and nothing is edited in place.

check weights -> trace -> parity -> [calibrate -> search] -> quantize and write -> compile -> [quality] -> bundle
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import onnx_ir as ir

from calibration.quantize.plan import plan
from calibration.quantize.tuning import Tuning
from calibration.requests.exams import Exam, exam_of
from export.build import auto
from export.build.auto import Plans
from export.build.bundle import draft, finish
from export.build.judging import agreed, judged
from export.build.keys import code
from export.build.learned import captured, compensated, floating_model, tuned
from export.build.options import Options
from export.build.parts import twin_parity
from export.build.staging import cached, key_of, staging
from export.build.state import Build, part_graph
from export.build.steps import steps
from export.build.writing import compile_all, compiled, write, written
from export.checks import parity
from export.family import Part
from export.finished.artifacts import remove_graphs
from export.report.compare import right
from export.report.progress import Listener, Progress
from runtime.bundle.manifest import Bundle, Parity
from runtime.engine import target
from runtime.errors import BundleError, InvalidInput, NotFound, ResourceExhausted
from runtime.placing.heap import return_freed_memory
from runtime.placing.loading import load_model


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
    return_freed_memory()
    progress = Progress(steps(state), listen)
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


def _fill(state: Build, folder: Path, progress: Progress) -> None:
    """Make everything of the bundle in a new folder."""
    _check_weights(state, progress)
    graphs, parities = _trace(state, progress)
    _check_quantized(state, graphs)
    tunings = _tune(state, folder, progress)
    graphs |= {name: tuning.folded(graphs[name]) for name, tuning in tunings.items()}
    searched = state.options.quant == "auto"
    plans = _search(state, graphs, tunings, folder, progress) if searched else _plans(state, graphs, tunings)
    submodels = [
        written(state, part, graphs.pop(part.name), plans.get(part.name), tunings.get(part.name), folder, progress)
        for part in state.parts
    ]
    submodels = [one.model_copy(update={"parity": parities[one.name]}) for one in submodels]
    artifacts = compile_all(state, folder, submodels, progress)
    if state.checked:
        artifacts = agreed(state, folder, submodels, artifacts, progress)
    verdict = judged(state, folder, submodels, artifacts, progress) if state.measured else None
    if state.options.strip_canonical:
        remove_graphs(folder, submodels, artifacts)
    with progress.step("bundle", "hash"):
        finish(state, folder, submodels, artifacts, verdict)


def _check_weights(state: Build, progress: Progress) -> None:
    """Raises SourceError where a tensor holds NaN or infinity."""
    with progress.step("weights", "check") as notes:
        state.check_weights()
        notes += [f"{state.nbytes / 1e9:.2f} GB", *state.refused]


def _trace(state: Build, progress: Progress) -> tuple[dict[str, ir.Model], dict[str, Parity]]:
    """The graph of each part, and how near it is to the library's own model. Raises ParityError."""
    graphs, parities = {}, {}
    for part in state.parts:
        with progress.step(part.name, "trace") as notes:
            graphs[part.name] = part_graph(state, part)
            notes.append(f"{sum(1 for _ in graphs[part.name].graph)} nodes")
        with progress.step(part.name, "parity") as notes:
            parities[part.name] = _parity(state, part)
            notes.append(f"{parities[part.name].method}, error {parities[part.name].error:.1e}")
    return graphs, parities


def _tune(state: Build, folder: Path, progress: Progress) -> dict[str, Tuning]:
    """What calibration finds for the parts that take part in it."""
    calibrated = [part for part in state.parts if state.calibrated(part)]
    if not calibrated:
        return {}
    with progress.step("pipeline", "calibrate") as notes:
        samples = captured(state, folder)
        counts = ", ".join(f"{len(calls)} of {name}" for name, calls in samples.samples.items())
        notes += [counts, *samples.warnings()]
    tunings = {}
    for part in calibrated:
        with progress.step(part.name, "tune") as notes:
            tuning = tuned(state, part, samples)
            notes.append(f"{len(tuning.ranges)} ranges, {len(tuning.folds)} folds")
        if state.compensated(part):
            with progress.step(part.name, "compensate") as notes:
                tuning = compensated(state, part, tuning, samples.samples[part.name])
                notes.append(f"{len(tuning.compensated)} weights")
        tunings[part.name] = tuning
    return tunings


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
            found.append(twin_parity(state.family, state.source, part.name, state.tools))
        path.write_text(parity.worst(found).model_copy(update={"method": state.method}).model_dump_json())

    key = key_of("parity", state.fingerprint, part.name, part.floor, state.method, state.tools, code())
    return Parity.model_validate_json(cached(key, ".json", compare).read_bytes())


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
            write(part, graphs[part.name], plans[part.name], tunings.get(part.name), trial) for part in state.parts
        ]
        try:
            artifacts = [compiled(target("onnxruntime"), submodel, trial) for submodel in submodels]
            with closing(load_model(draft(state, trial, submodels, artifacts), "onnxruntime")) as model:
                yield from right(model, exam, auto.CASES, held=False, seed=1, first=first)
        finally:
            shutil.rmtree(trial)

    return judge


def _existing(output: Path) -> Bundle | None:
    """What an earlier build left at the output, if it can be read."""
    try:
        return Bundle(output)
    except (BundleError, NotFound):
        return None
