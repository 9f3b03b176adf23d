"""What a model family declares. One file per family in `export/families/`, found by listing the folder; there is no
other registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

import export.families
from export.checkpoint.component import open_file
from export.checkpoint.source import Checkpoint, Source, TensorRef, open_component
from runtime.bundle.signature import Signature
from runtime.errors import InvalidInput, UnsupportedModel, did_you_mean
from runtime.listing import modules

Reference = Callable[..., tuple[Tensor, ...]]
"""A submodel as the library itself computes it: from its graph inputs in order to its graph outputs in order."""


@dataclass(frozen=True)
class Component:
    """A library model as a checkpoint stores it: built without weights from its config.

    `folder` is relative to the source; `root` says where the files lie that are no part of the source, such as those of
    an adapter, and `folder` only names them then. `named` gives the tensors of such a file the library's names, where
    its own are others. `tensors` are those that the pipeline reads itself, of whatever part:
    names in the library's model by those that `runtime.bundle.tensors.read_tensor` finds them under.
    """

    folder: str
    model: nn.Module
    root: Path | None = None
    named: Callable[[Mapping[str, TensorRef]], Mapping[str, TensorRef]] | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    def place(self, source: Source) -> Path:
        """The folder of its files."""
        return self.root or source.root / self.folder

    def open(self, source: Source) -> Checkpoint:
        """Its published weights. Raises what `open_component` raises."""
        if self.root is None:
            return source.open(self.folder)
        found = open_file(self.root) if self.root.is_file() else open_component(self.root)
        return found if self.named is None else replace(found, tensors=self.named(found.tensors))


@dataclass(frozen=True)
class Part:
    """One submodel: a module over the components' own parameters, and its signature.

    Most have one component. A submodel of several joins what lies in several folders, such as a UNet and the adapter
    whose projections its attention uses: a parameter that two components have is read from the later one.
    `module` takes the signature's graph inputs in order and returns its graph outputs in order: it is traced.
    `reference` takes and returns the same by the library's own forward over `components`: parity compares the graph
    with it. `activations` says whether int8 also covers activations (W8A8, calibrated) or only weights, and with
    `convolutional` int4 does so, too: where most of the work is in convolutions, whose int4 weights run in int8 kernels
    (`runtime.targets.lowering.nested`). `least_bits` 8 keeps its weights from int4. `float16` False keeps targets from
    computing it in float16, whose range (to 65504) its values leave. `floor` is the largest relative error that the
    parity gate lets pass.
    """

    name: str
    components: tuple[Component, ...]
    module: nn.Module
    reference: Reference
    signature: Signature
    activations: bool = True
    convolutional: bool = False
    least_bits: Literal[4, 8] = 4
    float16: bool = True
    floor: float = 1e-3

    def tensor(self, component: Component, name: str) -> str:
        """The name of a component's tensor in the part's graph: the library's, which begins with the component's folder
        where there are several components.
        """
        return f"{component.folder}.{name}" if component.folder and len(self.components) > 1 else name

    def names(self) -> dict[int, str]:
        """The name of each parameter of the components, by its `id`."""
        return {
            id(parameter): self.tensor(component, name)
            for component in self.components
            for name, parameter in component.model.named_parameters(remove_duplicate=False)
        }

    def parameters(self) -> dict[str, str]:
        """The same names by those of the parameters in `module`."""
        known = self.names()
        return {name: known[id(one)] for name, one in self.module.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class Family:
    """Everything about a model family.

    `parts(source, reduced)` builds the submodels without weights; `reduced` asks for the twin: same code and config,
    fewer layers. `config(source)` is what the device side's pipeline needs; `assets(source)` maps bundle paths to the
    model's own files, such as those of its tokenizer. `notes(source)` are sentences on what of the checkpoint is served
    otherwise than published (`Manifest.notes`): what cannot be served is refused, what is replaced or left out is
    reported. `additions` are the kinds of additions that it takes (`export.checkpoint.additions`). `pipeline` names the
    algorithm, or says it of a source where models of the family differ in it.
    """

    name: str
    pipeline: str | Callable[[Source], str]
    architectures: tuple[str, ...]
    parts: Callable[[Source, bool], list[Part]]
    config: Callable[[Source], dict[str, Any]]
    assets: Callable[[Source], Mapping[str, Path]]
    notes: Callable[[Source], Sequence[str]] = lambda source: ()
    additions: tuple[str, ...] = ()

    def pipeline_of(self, source: Source) -> str:
        """The name of the pipeline of this model."""
        return self.pipeline if isinstance(self.pipeline, str) else self.pipeline(source)

    def check_additions(self, source: Source) -> None:
        """Raises InvalidInput naming the first addition of a kind that the family does not take."""
        for one in source.additions:
            if one.kind not in self.additions:
                taken = f"it takes {', '.join(self.additions)}" if self.additions else "it takes no additions"
                raise InvalidInput(one.kind, f"does not apply to a {source.architecture}, {taken}: leave it out")


@cache
def families() -> dict[str, Family]:
    """Every family by architecture name."""
    found = [module.FAMILY for module in modules(export.families)]
    return {architecture: family for family in found for architecture in family.architectures}


def family_of(source: Source) -> Family:
    """The family that knows the source's architecture. Raises UnsupportedModel with the nearest known name."""
    known = families()
    if source.architecture not in known:
        nearest = did_you_mean(source.architecture, known)
        raise UnsupportedModel(f"{source.root} is a {source.architecture}, which no family handles: {nearest}")
    return known[source.architecture]
