"""One build: what was read of its source, what follows from its options, and what its manifest says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import onnx_ir as ir

from calibration.capture.sets import CalibrationSet
from calibration.ground.progress import each
from calibration.quantize.recipes import RECIPES, Recipe, recipe
from calibration.requests.requests import BRIEF_REQUESTS, REQUESTS, built_in_key
from calibration.requests.task import task_requests
from export.architecture.adapters import Adapters
from export.build.keys import code
from export.build.options import Options
from export.build.parts import TOOLS, library_parts, parts_of, traced, versions_of
from export.build.staging import key_of
from export.checkpoint.changes import Changes, changes_of
from export.checkpoint.component import fingerprint_of
from export.checkpoint.preflight import rehearse
from export.checkpoint.source import Checkpoint, Source, TensorRef, check_finite, resolve
from export.family import Family, Part, family_of
from export.graph import weights as graph
from runtime.bundle.manifest import Addition as BundleAddition
from runtime.bundle.manifest import sha256
from runtime.engine import target
from runtime.pipeline import pipelines
from runtime.targets.lowering.half import Half

FULL_QUALITY_BYTES: Final = 1 << 30
"""`auto` compares quantized models up to this size of weights, and captures briefly beyond: the float model runs in
little memory, but slowly.
"""
SPEED_BYTES: Final = 256 << 20
"""`auto` times quantized models up to this size of weights: all that are compared lie in memory at once, in float32 but
for one.
"""
FULL_PARITY_BYTES: Final = 4 << 30
"""`auto` compares the whole model up to this size of weights, and its reduced twin beyond."""


@dataclass
class Build:
    """One build under way: what was read, and what follows from its options: recipes, what is measured, the
    steps to come.
    """

    options: Options
    source: Source
    family: Family
    parts: list[Part]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    """What the model does not take, such as system messages: found by the dry run, as are the `parts` that are built:
    those that the pipeline calls.
    """

    @classmethod
    def open(cls, options: Options) -> Build:
        """Read configs and headers, and try the model's files together; nothing of the weights yet. Raises
        SourceError.
        """
        source = replace(resolve(options.source, options.variant, options.config), additions=tuple(options.additions))
        family = family_of(source)
        parts = library_parts(source, family)
        build = cls(options, source, family, parts)
        for part in parts:
            for component in part.components:
                if component.folder not in build.checkpoints:
                    build.checkpoints[component.folder] = component.open(source)
        _ = build.calibration, build.changes  # what does not fit is refused before any work
        build.refused, build.parts = rehearse(source, family, parts, build.tensors, build.assets)
        return build

    def new_parts(self) -> list[Part]:
        """The parts once more, without weights: for what gives them their own."""
        names = {part.name for part in self.parts}
        return [part for part in parts_of(self.source, self.family) if part.name in names]

    def weights(self, part: Part) -> dict[str, TensorRef]:
        """The tensors of the part's components by their names in its graph."""
        found, later = dict[str, TensorRef](), set[int]()
        for component in reversed(part.components):
            own = dict(component.model.named_parameters(remove_duplicate=False))
            elsewhere = {name for name, parameter in own.items() if id(parameter) in later}
            changed = self.changes.refs(component.folder)
            mapped = self.checkpoints[component.folder].mapped(component.model, elsewhere | changed.keys()) | changed
            found |= {part.tensor(component, name): ref for name, ref in mapped.items() if name not in elsewhere}
            later |= set(map(id, own.values()))
        return found

    @cached_property
    def changes(self) -> Changes:
        """The weights that are computed of the checkpoint's and of what is added. Raises SourceError."""
        models = {component.folder: component.model for part in self.parts for component in part.components}
        return changes_of(self.source, models, self.checkpoints)

    def check_weights(self) -> None:
        """Read every weight once, and compute those that are changed. Raises SourceError where one is not finite."""
        for checkpoint in each("component", self.checkpoints.values()):
            check_finite(checkpoint.tensors)
        self.changes.write()

    @cached_property
    def assets(self) -> dict[str, Path]:
        """The model's own files, and the LoRA files that requests choose from, by their path in the bundle."""
        adapters = Adapters.of(self.source, self.parts)
        return {**self.family.assets(self.source), **adapters.files(self.parts)}

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """The tensors of the checkpoint that the pipeline reads itself, by their names in the bundle."""
        return {
            name: self.weights(part)[part.tensor(component, own)]
            for part in self.parts
            for component in part.components
            for name, own in component.tensors.items()
        }

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What of the source is served otherwise than published, and which weights are read that nobody chose."""
        return (*self.family.notes(self.source), *self._variants(), *self._borrowed())

    def _variants(self) -> Iterator[str]:
        """A sentence for each component that is read in another variant than chosen."""
        own = {name: one for name, one in self.checkpoints.items() if one.root.is_relative_to(self.source.root)}
        for name, one in own.items():
            what = name or "the model"
            if one.variant and one.variant != self.options.variant:
                yield f"{what} has no weights but those of the variant {one.variant}, which are read"
            elif one.variant != self.options.variant and self.source.file is None:
                yield f"{what} has no variant {self.options.variant}: its plain weights are read"

    def _borrowed(self) -> Iterator[str]:
        """A sentence on the components that a single file lacks."""
        file, root = self.source.file, self.source.root
        apart = [name for name, one in self.checkpoints.items() if file not in one.headers and one.root.parent == root]
        if file is not None and apart:
            yield f"{', '.join(apart)} are those of the folder of small files: {file.name} has no weights of them"

    @property
    def name(self) -> str:
        return self.options.name or self.source.name

    @property
    def task(self) -> str:
        """The task that the model's pipeline does."""
        return pipelines()[self.family.pipeline_of(self.source)].task

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and of what is added to them."""
        components = {folder: checkpoint.fingerprint for folder, checkpoint in self.checkpoints.items()}
        return key_of(components, *(one.model_dump() for one in self.additions))

    @cached_property
    def additions(self) -> tuple[BundleAddition, ...]:
        """What is added, as the manifest states it."""
        return tuple(
            BundleAddition(kind=one.kind, name=one.name, scale=one.scale, fingerprint=fingerprint_of(one))
            for one in self.source.additions
        )

    @cached_property
    def tools(self) -> dict[str, str]:
        """Versions of Python and of what makes and calibrates graphs, whatever they are compiled for."""
        recipes = (recipe for part in self.parts if (recipe := self.recipe(part)) is not None)
        return versions_of([*TOOLS, *(name for recipe in recipes for name in recipe.packages)])

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of everything that a bundle depends on."""
        return self.tools | versions_of(
            [name for target_name in self.options.targets for name in target(target_name).packages]
        )

    @cached_property
    def key(self) -> str:
        options = self.options
        files = {path: sha256(file) for path, file in self.assets.items()}
        requested: list[object] = [
            self.name,
            options.quant,
            sorted(options.targets),
            options.parity,
            self.checked,
            self.measured,
            self.timed,
            self.calibration_key,
            options.compute,
            options.block,
            options.strip_canonical,
            {name: dict(settings) for name, settings in options.settings.items()},
        ]
        if options.quant == "auto":
            requested += [options.max_drop, options.goal]
        published = self.family.config(self.source), self.notes
        return key_of(self.fingerprint, files, published, requested, self.versions, code())

    def recipe(self, part: Part) -> Recipe | None:
        """The recipe of a part; of a search, the one whose ranges it needs."""
        name = "int8" if self.options.quant == "auto" else self.options.quant
        if name == "none":
            return None
        found = recipe(name, part.activations, part.least_bits)
        if found.bits == 4 and not part.convolutional:
            found = replace(found, activations=False)
        return replace(found, block=self.options.block) if self.options.block and found.bits == 4 else found

    def requested(self, part: Part) -> tuple[str, str] | None:
        """The form that a part's weights should take, and why all of it takes another where that is so; None without
        quantization.
        """
        quant, found = self.options.quant, self.recipe(part)
        if quant not in RECIPES or found is None:
            return ("auto", "chosen by the search") if quant == "auto" else None
        wanted = RECIPES[quant]
        if found.bits > wanted.bits:
            return _form(
                wanted
            ), f"kept at {_form(found)}, where the errors of this submodel cost more than those of others"
        return _form(wanted), "inputs that stay float need int8 weights" if wanted.fp8 and not found.fp8 else ""

    def calibrated(self, part: Part) -> bool:
        """Whether captured inputs decide how a part is quantized.

        They do where activations are, at int4 unless each call takes many seconds, and everywhere with a set that was
        given.
        """
        found = self.recipe(part)
        if found is None:
            return False
        given = self.calibration is not None and bool(self.calibration.samples.get(part.name))
        return given or found.activations or (found.bits == 4 and not self.brief)

    def compensated(self, part: Part) -> bool:
        """Whether a calibrated part's int4 weights are compensated for the errors of those rounded before
        (`calibration.quantize.gptq`).

        Those of large models are with a set that was given: it takes long.
        """
        found = self.recipe(part)
        return (
            found is not None
            and found.bits == 4
            and self.calibrated(part)
            and (self.calibration is not None or not self.brief)
        )

    def capturing(self, requests: int | None = None) -> float:
        """A guess of the seconds that capturing so many requests takes (None: those that are built in).

        The float model casts its weights for every call.
        """
        if self.calibration is not None:
            return 0.5
        requests = requests or (BRIEF_REQUESTS if self.brief else REQUESTS)
        task = task_requests()[self.task]
        calls = requests * (task.brief_calls if self.brief else task.calls)
        return requests + 5 * self.nbytes / 1e9 * calls

    @property
    def nbytes(self) -> int:
        """Bytes of all weights of the checkpoint."""
        return sum(ref.nbytes for checkpoint in self.checkpoints.values() for ref in checkpoint.tensors.values())

    @property
    def brief(self) -> bool:
        """Whether captures are brief: each call of the float model takes many seconds."""
        return self.nbytes > FULL_QUALITY_BYTES

    def least_bytes(self) -> int:
        """Bytes that the weights of the bundle will take at least, with every one of them quantized as far as the
        recipe goes.
        """
        if self.options.quant == "none":
            return sum(map(self.size, self.parts))
        bits = RECIPES["int4" if self.options.quant == "auto" else self.options.quant].bits
        return sum(math.prod(ref.shape) for part in self.parts for ref in self._refs(part)) * bits // 8

    @property
    def checked(self) -> bool:
        """Whether what targets compiled is compared with the canonical graphs."""
        return self._done(self.options.agreement)

    @property
    def measured(self) -> bool:
        """Whether quality is measured."""
        return self.options.quant != "none" and self._done(self.options.quality) and self.judge is not None

    def _done(self, option: str) -> bool:
        """Whether a comparison with this option is made: one of auto, full, none."""
        return option == "full" or (option == "auto" and self.nbytes <= FULL_QUALITY_BYTES)

    @cached_property
    def judge(self) -> str | None:
        """The target that quality is measured on: one of the bundle's that runs here, else ONNX Runtime if it has the
        kernels.
        """
        usable = [name for name in self.options.targets if target(name).available().usable]
        needed = RECIPES[self.options.quant].precisions if self.options.quant in RECIPES else frozenset()
        return next((name for name in [*usable, "onnxruntime"] if needed <= target(name).precisions), None)

    def half(self, part: Part) -> Half | None:
        """The half precision that targets compute a part in where they have it; None for float32 alone."""
        chosen = self.recipe(part)
        wanted = self.options.compute if self.options.compute != "auto" else chosen.half if chosen else None
        if wanted == "bfloat16":
            return "bfloat16"
        return "float16" if wanted == "float16" and part.float16 else None

    @property
    def timed(self) -> bool:
        """Whether the quantized model is timed beside the float one and PyTorch."""
        wanted = self.options.speed == "full" or (self.options.speed == "auto" and self.nbytes <= SPEED_BYTES)
        return self.measured and wanted and all(target(name).available().usable for name in self.options.targets)

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """The set given to calibrate with. Raises NotFound, SourceError, or InvalidInput when it is of another
        checkpoint.
        """
        if self.options.calibration is None:
            return None
        found = CalibrationSet.load(self.options.calibration)
        found.check(self.fingerprint, self.name)
        return found

    @cached_property
    def calibration_key(self) -> str:
        """Identifies what is calibrated with: the set given, else what makes the built-in requests."""
        if self.calibration is not None and self.options.calibration is not None:
            return sha256(self.options.calibration)
        return built_in_key(self.fingerprint)

    @property
    def method(self) -> str:
        """How parity is established: "full" or "twin"."""
        if self.options.parity != "auto":
            return self.options.parity
        return "full" if self.nbytes <= FULL_PARITY_BYTES else "twin"

    def size(self, part: Part) -> int:
        """Bytes of the part's weights in the checkpoint."""
        return self._sizes[part.name]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {part.name: sum(ref.nbytes for ref in self._refs(part)) for part in self.parts}

    def _refs(self, part: Part) -> list[TensorRef]:
        """The tensors of the checkpoint that the part has."""
        names = set(part.parameters().values())
        return [ref for name, ref in self.weights(part).items() if name in names]


def _form(recipe: Recipe) -> str:
    """What most weights become, in the manifest's words."""
    return recipe.half or ("fp8" if recipe.fp8 else "int8" if recipe.bits == 8 else recipe.four_bits)


def part_graph(state: Build, part: Part) -> ir.Model:
    """The part's graph on the checkpoint's own bytes."""
    model = ir.load(traced(state.source, part, state.tools))
    graph.attach(model, part.parameters(), state.weights(part))
    return model
