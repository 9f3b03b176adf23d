"""The build: from a checkpoint to a bundle. Each step takes what the one before made, and nothing is edited in place.

check weights -> trace -> parity -> [calibrate -> search] -> quantize and write -> compile -> [quality] -> bundle
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

import export.trace
from calibration.codes import read_codes, read_records
from calibration.data import SAMPLES, record
from calibration.gptq import compensate
from calibration.lean import LeanEngine
from calibration.precision import Precision, store
from calibration.quantize import RECIPES, LayerPlan, Recipe, plan, recipe
from calibration.requests import briefly, built_in
from calibration.sets import CalibrationSet
from calibration.tuning import Tuning
from export import auto, graph, parity
from export.agreement import Reference, agree, told
from export.artifacts import remove_graphs
from export.auto import Plans
from export.baseline import compare_speed
from export.family import Family, Part, family_of
from export.options import Options
from export.progress import Listener, Progress, Step
from export.quality import Pictures, Quality, measure, save_quality
from export.source import Checkpoint, Source, TensorRef, check_finite, open_component, resolve
from export.staging import cached, key_of, staging
from export.tasks import TASKS, right
from export.twin import twin_weights
from runtime.bundle import MANIFEST, Artifact, Bundle, Manifest, Parity, Submodel, Verdict, sha256
from runtime.bundle import Source as BundleSource
from runtime.engine import CompileOptions, Engine, target
from runtime.errors import BundleError, EnginecastError, NotFound, QualityError, SourceError
from runtime.loading import PIPELINES, LoadedModel, load_model
from runtime.lowering import Half
from runtime.signature import Array

FULL_QUALITY_BYTES: Final = 1 << 30
"""`auto` compares quantized models up to this size of weights, and captures briefly beyond: the float model runs in little memory, but
slowly."""
SPEED_BYTES: Final = 256 << 20
"""`auto` times quantized models up to this size of weights: all that are compared lie in memory at once, in float32 but for one."""
FULL_PARITY_BYTES: Final = 4 << 30
"""`auto` compares the whole model up to this size of weights, and its reduced twin beyond."""
M_MMAP_THRESHOLD: Final = -3
REPORTS: Final = {"artifacts", "baseline", "bundles", "cli", "console", "demo", "progress", "quality", "report", "sizes", "speed", "timed"}
"""Modules that look at what was built and change nothing of it."""
PACKAGES: Final = (
    "enginecast",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "coremltools",
)


@dataclass
class Build:
    """One build under way: what was read, and the steps that turn it into a bundle."""

    options: Options
    source: Source
    family: Family
    parts: list[Part]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)

    @classmethod
    def open(cls, options: Options) -> Build:
        """Read configs and headers; nothing of the weights yet. Raises SourceError."""
        source = resolve(options.source)
        family = family_of(source)
        try:
            parts = family.parts(source, False)
        except (EnginecastError, AssertionError):
            raise
        except Exception as error:  # the libraries check configs with exceptions of every kind
            reason = " ".join(str(error).split())
            raise SourceError(
                f"{source.root}: its config files do not describe a {source.architecture} the libraries can make "
                f"({type(error).__name__}: {reason}). Download them again"
            ) from error
        build = cls(options, source, family, parts)
        for part in parts:
            folder = part.component.folder
            if folder not in build.checkpoints:
                build.checkpoints[folder] = open_component(source.root / folder if folder else source.root)
        _ = build.calibration  # a wrong set is refused before any work
        return build

    def weights(self, part: Part) -> dict[str, TensorRef]:
        """The tensors of the part's component by the library's names."""
        return self.checkpoints[part.component.folder].mapped(part.component.model)

    @property
    def name(self) -> str:
        return self.options.name or self.source.name

    @cached_property
    def fingerprint(self) -> str:
        return key_of({folder: checkpoint.fingerprint for folder, checkpoint in self.checkpoints.items()})

    @cached_property
    def versions(self) -> dict[str, str]:
        found = {name: _version(name) for name in PACKAGES}
        return {"python": sys.version.split()[0]} | {name: version for name, version in found.items() if version}

    @cached_property
    def key(self) -> str:
        options = self.options
        files = {path: sha256(file) for path, file in self.family.assets(self.source).items()}
        asked: list[object] = [
            self.name,
            options.quant,
            sorted(options.targets),
            options.parity,
            self.checked,
            self.timed,
            self.calibration_key,
            options.compute,
            options.block,
            options.strip_canonical,
            {name: dict(settings) for name, settings in options.settings.items()},
        ]
        if options.quant == "auto":
            asked += [options.max_drop, options.goal]
        return key_of(self.fingerprint, files, self.family.config(self.source), asked, self.versions, _code())

    def recipe(self, part: Part) -> Recipe | None:
        """The recipe of a part; of a search, the one whose ranges it needs."""
        name = "int8" if self.options.quant == "auto" else self.options.quant
        if name == "none":
            return None
        found = recipe(name, part.activations, part.least_bits)
        return replace(found, block=self.options.block) if self.options.block and found.bits == 4 else found

    def calibrated(self, part: Part) -> bool:
        """Whether captured inputs decide how a part is quantized.

        They do where activations are, at int4 unless each call takes many seconds, and everywhere with a set that was given.
        """
        found = self.recipe(part)
        if found is None:
            return False
        given = self.calibration is not None and bool(self.calibration.samples.get(part.name))
        return given or found.activations or (found.bits == 4 and not self.brief)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights of the checkpoint."""
        return sum(ref.nbytes for checkpoint in self.checkpoints.values() for ref in checkpoint.tensors.values())

    @property
    def brief(self) -> bool:
        """Whether captures are brief: each call of the float model takes many seconds."""
        return self.nbytes > FULL_QUALITY_BYTES

    @property
    def checked(self) -> bool:
        """Whether what targets compiled is compared with the canonical graphs."""
        return self.options.quality == "full" or (self.options.quality == "auto" and self.nbytes <= FULL_QUALITY_BYTES)

    @property
    def measured(self) -> bool:
        """Whether quality is measured."""
        return self.options.quant != "none" and self.checked and self.judge is not None

    @cached_property
    def judge(self) -> str | None:
        """The target that quality is measured on: one of the bundle's that runs here, else ONNX Runtime if it has the kernels."""
        usable = [name for name in self.options.targets if target(name).available().usable]
        needed = RECIPES[self.options.quant].precisions if self.options.quant in RECIPES else frozenset()
        return next((name for name in [*usable, "onnxruntime"] if needed <= target(name).precisions), None)

    def half(self, part: Part) -> Half | None:
        """What targets that have it shall compute a part in, if not float32 alone."""
        chosen = self.recipe(part)
        asked = self.options.compute if self.options.compute != "auto" else chosen.half if chosen else None
        if asked == "bfloat16":
            return "bfloat16"
        return "float16" if asked == "float16" and part.float16 else None

    @property
    def timed(self) -> bool:
        """Whether the quantized model is timed beside the float one and PyTorch."""
        wanted = self.options.speed == "full" or (self.options.speed == "auto" and self.nbytes <= SPEED_BYTES)
        return self.measured and wanted and all(target(name).available().usable for name in self.options.targets)

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """The set given to calibrate with. Raises NotFound, SourceError, or InvalidInput when it is of another checkpoint."""
        if self.options.calibration is None:
            return None
        found = CalibrationSet.load(self.options.calibration)
        found.check(self.fingerprint, self.name)
        return found

    @cached_property
    def calibration_key(self) -> str:
        return sha256(self.options.calibration) if self.calibration is not None and self.options.calibration is not None else ""

    @property
    def method(self) -> str:
        """How parity is established: "full" or "twin"."""
        if self.options.parity != "auto":
            return self.options.parity
        return "full" if self.nbytes <= FULL_PARITY_BYTES else "twin"

    def size(self, part: Part) -> int:
        """Bytes of the part's weights in the checkpoint."""
        names = set(graph.parameter_names(part.module, part.component.model).values())
        return sum(ref.nbytes for name, ref in self.weights(part).items() if name in names)

    def steps(self) -> list[Step]:
        """Everything that will be done, with a guess of its seconds."""
        sizes = {part.name: self.size(part) / 1e9 for part in self.parts}
        steps = [Step("weights", "check", sum(sizes.values()) / 2)]
        for part in self.parts:
            modules, gigabytes = sum(1 for _ in part.module.modules()), sizes[part.name]
            steps += [Step(part.name, "trace", 2 + modules * 0.04), Step(part.name, "parity", 1 + 6 * gigabytes)]
        if any(map(self.calibrated, self.parts)):
            steps.append(Step("pipeline", "calibrate", 30))
        if self.options.quant == "auto":
            steps += [Step(part.name, "explore", 30) for part in self.parts] + [Step("pipeline", "search", 200)]
        for part in self.parts:
            steps.append(Step(part.name, "write", 0.2 + sizes[part.name] * (3 if self.options.quant == "none" else 15)))
        for name in self.options.targets:
            steps += [Step(part.name, f"compile {name}", 0.5 + 5 * sizes[part.name]) for part in self.parts]
        if self.checked:
            steps += [Step(part.name, f"check {name}", 1 + 20 * sizes[part.name]) for name in self.options.targets for part in self.parts]
        if self.measured:
            steps.append(Step("pipeline", "quality", 20))
        if self.timed:
            steps.append(Step("pipeline", "speed", 10))
        return [*steps, Step("bundle", "hash", 0.2)]


def build(options: Options, listen: Listener = lambda report: None) -> tuple[Bundle, dict[str, float]]:
    """Build a bundle; return it and the seconds that each stage took (none when it was there already, finished by the same build).

    Raises InvalidInput, SourceError, ParityError, EngineError or ResourceExhausted; `options.output` is then as it was.
    """
    state = Build.open(options)
    existing = _existing(options.output)
    if existing is not None and existing.manifest.key == state.key:
        try:
            existing.verify()
            return existing, {}
        except BundleError:
            if not options.force:
                raise
    _return_freed_memory()
    progress = Progress(state.steps(), listen)
    with staging(options.output, options.force) as folder:
        _fill(state, folder, progress)
    return Bundle(options.output), progress.timings


def _return_freed_memory() -> None:
    """From now on, blocks of a megabyte and more go back to the system once freed (mallopt(3), where the C library has it).

    glibc would raise that limit to 32 MB and keep freed layers: with Stable Diffusion's, half a gigabyte more at the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _fill(state: Build, folder: Path, progress: Progress) -> None:
    with progress.step("weights", "check") as notes:
        tensors = {name: ref for checkpoint in state.checkpoints.values() for name, ref in checkpoint.tensors.items()}
        for checkpoint in state.checkpoints.values():
            check_finite(checkpoint.tensors)
        notes.append(f"{sum(ref.nbytes for ref in tensors.values()) / 1e9:.2f} GB")
    graphs, parities = {}, {}
    for part in state.parts:
        with progress.step(part.name, "trace") as notes:
            graphs[part.name] = part_graph(state, part)
            notes.append(f"{sum(1 for _ in graphs[part.name].graph)} nodes")
        with progress.step(part.name, "parity") as notes:
            parities[part.name] = _parity(state, part)
            notes.append(f"{parities[part.name].method}, error {parities[part.name].error:.1e}")
    tunings: dict[str, Tuning] = {}
    if any(map(state.calibrated, state.parts)):
        with progress.step("pipeline", "calibrate") as notes:
            samples = _samples(state, folder)
            tunings = _tunings(state, samples)
            graphs = {name: tunings[name].folded(model) if name in tunings else model for name, model in graphs.items()}
            ranges, folds = (
                sum(len(found) for found in every) for every in zip(*((t.ranges, t.folds) for t in tunings.values()), strict=True)
            )
            notes += [f"{ranges} ranges, {folds} folds", *samples.warnings()]
    searched = state.options.quant == "auto"
    plans = _search(state, graphs, tunings, folder, progress) if searched else _plans(state, graphs, tunings)
    submodels = []
    for part in state.parts:
        with progress.step(part.name, "write") as notes:
            chosen, model = state.recipe(part), graphs.pop(part.name)
            if chosen is not None and chosen.half:
                model = store(model, chosen.half)
            submodel = _write(part, model, plans.get(part.name), tunings.get(part.name), folder)
            notes.append(f"{submodel.nbytes / 1e6:.1f} MB {submodel.precision}")
            if "int4" in submodel.precision and part.name not in tunings:
                notes.append("rounded without data: a set of `export calibrate` makes it better")
            half = state.half(part)
            if half is not None:
                found = Precision.measure(
                    folder / submodel.graph, half, _samples(state, folder).samples[part.name], part_graph(state, part)
                )
                submodel = submodel.model_copy(update={"compute": found.compute, "keep": tuple(found.keep)})
                notes.append(found.reason or f"computes in {found.compute} at {found.snr_db:.1f} dB, {len(found.keep)} nodes in float32")
            submodels.append(submodel.model_copy(update={"parity": parities[part.name]}))
    artifacts = []
    for name in state.options.targets:
        for submodel in submodels:
            with progress.step(submodel.name, f"compile {name}"):
                options = CompileOptions(
                    state.options.settings.get(name, {}), lambda share, phase: progress.note(phase, round(100 * share), 100)
                )
                artifacts.append(_compile(target(name), submodel, folder, options))
    if state.checked:
        artifacts = _agreed(state, folder, submodels, artifacts, progress)
    verdict = _judged(state, folder, submodels, artifacts, progress) if state.measured else None
    if state.options.strip_canonical:
        remove_graphs(folder, submodels, artifacts)
    with progress.step("bundle", "hash"):
        _finish(state, folder, submodels, artifacts, verdict=verdict)


def part_graph(state: Build, part: Part) -> ir.Model:
    """The part's graph on the checkpoint's own bytes. Tracing is what takes long, so its result is kept for the next build."""
    weights = state.weights(part)
    settings: Any = part.component.model.config
    config = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
    key = key_of("graph", part.name, config, part.signature.model_dump(), state.versions, _code())
    path = cached(key, ".onnx", lambda path: graph.save_traced(export.trace.trace(part.module, part.signature), path))
    model = ir.load(path)
    graph.attach(model, graph.parameter_names(part.module, part.component.model), weights)
    return model


def _parity(state: Build, part: Part) -> Parity:
    """Compare once for the same weights, graph and versions."""

    def compare(path: Path) -> None:
        if state.method == "full":
            found = parity.check(part, part_graph(state, part), state.weights(part), "full")
        else:
            found = _twin_parity(state, part)
        path.write_text(found.model_dump_json())

    key = key_of("parity", state.fingerprint, part.name, part.floor, state.method, state.versions, _code())
    return Parity.model_validate_json(cached(key, ".json", compare).read_bytes())


def _twin_parity(state: Build, part: Part) -> Parity:
    twin = next(other for other in state.family.parts(state.source, True) if other.name == part.name)
    with twin_weights(twin) as weights:
        model = export.trace.trace(twin.module, twin.signature)
        graph.attach(model, graph.parameter_names(twin.module, twin.component.model), weights)
        return parity.check(twin, model, weights, "twin")


def _samples(state: Build, folder: Path) -> CalibrationSet:
    """The set given, else what submodels get while the float model does built-in requests, captured once for the same checkpoint."""
    if state.calibration is not None:
        return state.calibration

    def measure(path: Path) -> None:
        with floating_model(state, folder) as model:
            requests = built_in(model.kind)
            record(model, briefly(requests) if state.brief else requests, limit=SAMPLES).save(path)

    key = key_of("samples", state.fingerprint, state.family.config(state.source), state.versions, _code())
    return CalibrationSet.load(cached(key, ".safetensors", measure))


def _tunings(state: Build, samples: CalibrationSet) -> dict[str, Tuning]:
    """What calibration finds for each part that takes part in it."""

    def measure(path: Path) -> None:
        found = {}
        for part in filter(state.calibrated, state.parts):
            chosen = state.recipe(part)
            assert chosen is not None
            found[part.name] = Tuning.measure(part_graph(state, part), chosen, samples.samples[part.name]).record()
        path.write_text(json.dumps(found))

    asked = state.options.quant, state.options.block, state.calibration_key
    key = key_of("tunings", state.fingerprint, asked, state.versions, _code())
    data = json.loads(cached(key, ".json", measure).read_bytes())
    tunings = {name: Tuning.of_record(record) for name, record in data.items()}
    parts = {part.name: part for part in state.parts}
    return {name: _compensated(state, parts[name], found, samples.samples[name]) for name, found in tunings.items()}


def _compensated(state: Build, part: Part, tuning: Tuning, calls: Sequence[Mapping[str, Array]]) -> Tuning:
    """The tuning with int4 weights compensated on these calls; as it is without such weights, or where one call is all there is."""
    chosen = state.recipe(part)
    assert chosen is not None
    if chosen.bits != 4 or len(calls) < 2:
        return tuning
    model = part_graph(state, part)
    layers = plan(model, chosen)
    if not any(planned.weight_type == "int4" for planned in layers):
        return tuning
    key = key_of("codes", state.fingerprint, part.name, asdict(chosen), state.calibration_key, state.versions, _code())
    path = cached(key, ".safetensors", lambda path: compensate(model, layers, tuning.folds, calls, path))
    return replace(tuning, codes=read_codes(path), compensated={record["weight"]: record["snr_db"] for record in read_records(path)})


def _agreed(state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress) -> list[Artifact]:
    """The artifacts, each compared with its canonical graph where that can be done here."""
    calls = _samples(state, folder).samples if any(map(state.calibrated, state.parts)) else {}
    _finish(state, folder, submodels, artifacts)  # a manifest for now, as engines may read it
    references = {one.name: Reference(one, folder, calls.get(one.name, ())) for one in submodels}
    found = []
    for artifact in artifacts:
        with progress.step(artifact.submodel, f"check {artifact.target}") as notes:
            found.append(agree(target(artifact.target), references[artifact.submodel], artifact))
            notes.append(told(found[-1]))
    (folder / MANIFEST).unlink()
    return found


def _judged(state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], progress: Progress) -> Verdict:
    """Measure quality, and speed where that is asked for, and store both in the bundle."""
    assert state.judge is not None
    judges = [] if state.judge in state.options.targets else [_compile(target(state.judge), one, folder) for one in submodels]
    _finish(state, folder, submodels, [*artifacts, *judges])  # a manifest for now, so that the model can be loaded
    with progress.step("pipeline", "quality") as notes:
        quality, pictures = _quality(state, folder, progress)
        verdict = Verdict(figures=quality.summary(), shortfalls=tuple(quality.shortfalls(state.options.quant)))
        notes.append("; ".join(verdict.shortfalls) or "every floor held")
    if state.timed:
        with progress.step("pipeline", "speed"), floating_bundle(state, folder) as floating:
            parts = state.family.parts(state.source, False)  # new ones: they get their weights
            speed = compare_speed(folder, floating, parts, state.weights, note=progress.note)
            quality = quality.model_copy(update={"speed": speed})
    if judges:
        shutil.rmtree(folder / "engines" / state.judge, ignore_errors=True)
    (folder / MANIFEST).unlink()
    save_quality(folder, quality, pictures)
    return verdict


def _quality(state: Build, folder: Path, progress: Progress) -> tuple[Quality, Pictures]:
    """Compare the quantized model with the float one. Raises QualityError when it falls below a floor and that is not allowed."""
    samples = _samples(state, folder)
    with closing(load_model(folder, state.judge)) as quantized, floating_model(state, folder) as reference:
        quality, pictures = measure(quantized, reference, samples.samples, note=progress.note)
    faults = quality.shortfalls(state.options.quant)
    if faults and not state.options.allow_low_quality:
        raise QualityError(
            f"{state.name} at {state.options.quant} falls below what is worth shipping: {'; '.join(faults)}. No bundle was written. "
            "Calibrate with more requests like yours (`export calibrate`), choose another --quant, or insist with --allow-low-quality"
        )
    return quality, pictures


@contextmanager
def floating_bundle(state: Build, folder: Path) -> Iterator[Path]:
    """The float model as a bundle for the same targets, in a folder of its own inside `folder` meanwhile: what speed is compared with."""
    root = folder / "float"
    root.mkdir()
    try:
        submodels = [_write(part, part_graph(state, part), None, None, root) for part in state.parts]
        artifacts = [_compile(target(name), submodel, root) for name in state.options.targets for submodel in submodels]
        _finish(state, root, submodels, artifacts, quant="none")
        yield root
    finally:
        shutil.rmtree(root)


@contextmanager
def floating_model(state: Build, folder: Path) -> Iterator[LoadedModel]:
    """The float model on weights mapped from the checkpoint, each submodel loaded when its first call comes.

    Its manifest and assets lie in a folder of its own inside `folder` meanwhile.
    """
    root = folder / "float"
    parts = {part.name: part for part in state.parts}
    submodels = {
        name: Submodel(name=name, signature=part.signature, graph=_place(name), precision="float32", nbytes=state.size(part))
        for name, part in parts.items()
    }
    root.mkdir()
    _finish(state, root, list(submodels.values()), [], quant="none")
    bundle = Bundle(root)

    class Engines(dict[str, Engine]):
        def __missing__(self, name: str) -> Engine:
            self[name] = LeanEngine(submodels[name], part_graph(state, parts[name]))
            return self[name]

    kind: Any = state.family.pipeline
    model = LoadedModel(bundle, kind, LeanEngine.target, LeanEngine.device, Engines(), PIPELINES[kind](bundle))
    try:
        yield model
    finally:
        model.close()
        shutil.rmtree(root)


def _plans(state: Build, graphs: Mapping[str, ir.Model], tunings: Mapping[str, Tuning]) -> Plans:
    """What the recipe makes of each part; nothing without one."""
    recipes = {part.name: state.recipe(part) for part in state.parts}
    return {name: tunings.get(name, Tuning()).plan(graphs[name], found) for name, found in recipes.items() if found is not None}


def _search(state: Build, graphs: Mapping[str, ir.Model], tunings: Mapping[str, Tuning], folder: Path, progress: Progress) -> Plans:
    """The plans of the search, which is written into the bundle."""
    samples, found = _samples(state, folder).samples, {}
    key = key_of("auto", state.fingerprint, state.calibration_key, state.versions, _code())
    for part in state.parts:
        with progress.step(part.name, "explore") as notes:
            tuning, calls = tunings.get(part.name, Tuning()), samples[part.name]
            explored = auto.Submodel.explore(
                graphs[part.name], part.activations, tuning, calls, state.options.goal, state.size(part), key_of(key, part.name)
            )
            found[part.name] = explored
            notes.append(f"noises {explored.how.method} in {explored.how.runs} runs, {len(explored.assignments)} assignments worth having")
    trial = folder / "trial"

    def done(plans: Plans | None, first: int) -> Generator[bool, None, None]:
        if plans is None:
            with floating_model(state, folder) as model:
                yield from right(model, auto.CASES, held=False, seed=1, first=first)
            return
        submodels = [_write(part, graphs[part.name], plans[part.name], tunings.get(part.name), trial) for part in state.parts]
        try:
            _finish(state, trial, submodels, [_compile(target("onnxruntime"), submodel, trial) for submodel in submodels])
            with closing(load_model(trial, "onnxruntime")) as model:
                yield from right(model, auto.CASES, held=False, seed=1, first=first)
        finally:
            shutil.rmtree(trial)

    with progress.step("pipeline", "search") as notes, ExitStack() as stack:
        exam = stack.enter_context(closing(auto.Exam(done, key))) if state.source.name in TASKS else None
        plans, tried = auto.search(found, state.options.goal, state.options.max_drop, exam)
        (folder / auto.FILE).write_text(tried.model_dump_json(indent=1))
        notes.append(f"{len(tried.points)} tried, {tried.claim}")
    return plans


def _write(part: Part, model: ir.Model, plans: Sequence[LayerPlan] | None, tuning: Tuning | None, folder: Path) -> Submodel:
    """Quantize as planned, if at all, and write one graph with its weights."""
    tuning, folded = tuning or Tuning(), model
    if plans is not None:
        model = tuning.quantize(folded, plans)
    nbytes = graph.write(model, folder / "onnx" / part.name)
    return Submodel(
        name=part.name,
        signature=part.signature,
        graph=_place(part.name),
        precision=graph.precision(model),
        nbytes=nbytes,
        dynamic=any(one.op == "MatMul" and one.weight_type in ("int8", "int4") and not one.activation for one in plans or ()),
        bfloat16=tuning.bfloat16(plans or ()),
        spans=tuning.spans(folded, plans or ()),
    )


def _place(submodel: str) -> str:
    """Where a submodel's graph lies in a bundle."""
    return f"onnx/{submodel}/{graph.MODEL}"


def _compile(engine: type[Engine], submodel: Submodel, folder: Path, options: CompileOptions | None = None) -> Artifact:
    return engine.compile_with(options or CompileOptions(), submodel, folder / submodel.graph, folder / "engines" / engine.target)


def _finish(
    state: Build, folder: Path, submodels: list[Submodel], artifacts: list[Artifact], quant: str = "", verdict: Verdict | None = None
) -> None:
    """Add the model's own files and the manifest."""
    for relative, file in state.family.assets(state.source).items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / relative)
    manifest = Manifest(
        name=state.name,
        key=state.key,
        pipeline=state.family.pipeline,
        quant=quant or state.options.quant,
        source=BundleSource(
            name=state.source.name, family=state.family.name, architecture=state.source.architecture, fingerprint=state.fingerprint
        ),
        submodels=tuple(submodels),
        artifacts=tuple(artifacts),
        config=state.family.config(state.source),
        versions=state.versions,
        quality=verdict,
        files={str(file.relative_to(folder)): sha256(file) for file in _files(folder)},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _existing(output: Path) -> Bundle | None:
    """What an earlier build left at the output, if it can be read."""
    try:
        return Bundle(output)
    except (BundleError, NotFound):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _code() -> str:
    """Identifies the code that makes graphs: a changed exporter must not reuse what an older one made. Reports make none."""
    roots = [Path(str(importlib.import_module(name).__file__)).parent for name in ("export", "calibration")]
    files = [file for root in roots for file in sorted(root.glob("*.py")) + sorted(root.glob("families/*.py")) if file.stem not in REPORTS]
    return key_of([file.read_text() for file in files])
