"""The dry run before a build: the pipeline that will use the bundle, on the model's own files, with engines that
compute no values.

It takes a second and no weights, and it finds what does not fit together while only small files were read: a tokenizer
with more tokens than the embedding, pictures of another size than the vision tower's, a UNet that expects another text
encoder, a missing chat template.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file

from export.checkpoint.component import CONFIG
from export.checkpoint.source import Source, TensorRef
from export.family import Family, Part
from runtime.bundle.signature import Array, Dim, Tensor
from runtime.bundle.tensors import FILE
from runtime.engine import Slot
from runtime.errors import EnginecastError, InvalidInput, SourceError, UnsupportedModel
from runtime.pipeline import Example, ModelPipeline, drive, pipelines


def lay_assets(assets: Mapping[str, Path], tensors: Mapping[str, TensorRef], folder: Path) -> None:
    """Copy the model's own files to where they lie in a bundle, and write the tensors that its pipeline reads."""
    for relative, file in assets.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / relative)
    if tensors:
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: ref.array().astype(np.float32) for name, ref in tensors.items()}, folder / FILE)


class Rehearsal(NamedTuple):
    """What a dry run shows: what the model refuses, one line each, and the parts that its pipeline calls."""

    refused: list[str]
    called: list[Part]


def rehearse(
    source: Source,
    family: Family,
    parts: Iterable[Part],
    tensors: Mapping[str, TensorRef],
    assets: Mapping[str, Path],
) -> Rehearsal:
    """Open the family's pipeline on the source's files and let it answer its own examples. `tensors` of the checkpoint
    are those that the pipeline reads itself, `assets` its files.

    Raises SourceError when the files do not fit together, naming the file, and UnsupportedModel when a part cannot be
    computed.
    """
    named = {
        path: file if file.is_relative_to(source.root) else source.root / Path(path).name
        for path, file in assets.items()
    }
    with TemporaryDirectory(prefix="enginecast-") as name:
        folder = Path(name)
        lay_assets(assets, tensors, folder)
        try:
            pipeline = pipelines()[family.pipeline_of(source)].open(folder, _config(source, family))
            engines = {part.name: DryEngine(source, part, pipeline.origins) for part in parts}
            refused = [note for example in pipeline.examples() if (note := _try(pipeline, example, engines))]
            return Rehearsal(refused, [engine.part for engine in engines.values() if engine.called])
        except EnginecastError as error:
            kind = UnsupportedModel if isinstance(error, UnsupportedModel) else SourceError
            raise kind(_as_published(str(error), folder, named)) from error.__cause__


def _config(source: Source, family: Family) -> dict[str, Any]:
    try:
        return family.config(source)
    except ValidationError as error:
        reasons = "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())
        raise SourceError(f"{source.root}: its config files say what no model of this kind can do: {reasons}") from None


def _try(pipeline: ModelPipeline, example: Example, engines: Mapping[str, DryEngine]) -> str:
    """Why the model refuses an example that it may refuse; empty where it answers."""
    try:
        for _ in drive(pipeline(example.request), engines):  # type: ignore[arg-type]
            pass
    except InvalidInput as error:
        if not example.optional:
            raise SourceError(f"the model cannot answer a request with {example.what}: {error}") from None
        return f"refuses {example.what} ({error})"
    return ""


def _as_published(text: str, folder: Path, assets: Mapping[str, Path]) -> str:
    """An error's text with the paths of the source instead of those of the temporary folder."""
    for relative, file in assets.items():
        text = text.replace(str(folder / relative), str(file))
    for relative, file in assets.items():
        text = text.replace(str((folder / relative).parent), str(file.parent))
    return text


class DryEngine:
    """Stands for the engine of a part: checks what it is given against the part's signature, and answers zeros.

    The part's module runs on the meta device, where tensors have a shape and no values, so its outputs are checked as
    well. `origins` says what makes each input, for messages.
    """

    def __init__(self, source: Source, part: Part, origins: Mapping[str, str]) -> None:
        self.part, self._origins = part, origins
        self._file = part.components[0].place(source) / CONFIG
        self._past: WeakKeyDictionary[Slot, int] = WeakKeyDictionary()
        self._shapes: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        """Zeros shaped like the outputs. Raises SourceError when an input does not fit, UnsupportedModel when the part
        cannot compute.
        """
        signature = self.part.signature
        try:
            lengths = signature.bind(inputs)
            for tensor in signature.inputs:
                _check_values(tensor, inputs[tensor.name])
        except InvalidInput as error:
            raise SourceError(self._misfit(error)) from None
        if signature.states:
            assert slot is not None, "a part with states is called with a slot"
            port, total = signature.decoder, lengths[signature.decoder.total]
            lengths[port.past] = self._past.get(slot, 0)
            assert signature.complete(lengths)[port.total] == total, "positions add up"
            self._past[slot] = total
        shapes = self._outputs(signature.complete(lengths))
        return {
            tensor.name: np.zeros(shape, tensor.dtype) for tensor, shape in zip(signature.outputs, shapes, strict=False)
        }

    def trim(self, slot: Slot, length: int) -> None:
        self._past[slot] = min(length, self._past.get(slot, 0))

    @property
    def called(self) -> bool:
        return bool(self._shapes)

    def _outputs(self, lengths: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The shapes of the part's outputs, as its module gives them."""
        signature, file = self.part.signature, self._file
        given = tuple(tensor.shape(lengths) for tensor in signature.graph_inputs)
        if given not in self._shapes:
            arrays = [
                torch.zeros(shape, dtype=getattr(torch, tensor.dtype), device="meta")
                for tensor, shape in zip(signature.graph_inputs, given, strict=True)
            ]
            try:
                with torch.no_grad():
                    outputs: Any = self.part.module(*arrays)
            except Exception as error:  # a library's model raises whatever Python's operators raise
                reason = " ".join(str(error).split())[:300]
                raise UnsupportedModel(
                    f"{file} describes a {self.part.name} that cannot be built ({type(error).__name__}: {reason}). "
                    "docs/compatibility.md lists what can; if this model works in the library it was published for, "
                    "report that"
                ) from error
            shapes = [tuple(output.shape) for output in outputs]
            for tensor, shape in zip(signature.graph_outputs, shapes, strict=True):
                _check_output(self.part.name, file, tensor, shape, lengths)
            self._shapes[given] = shapes
        return self._shapes[given]

    def _misfit(self, error: InvalidInput) -> str:
        origin = self._origins.get(error.field)
        made = f", which {origin} makes," if origin else ""
        problem = str(error).removeprefix(f"{error.field}: ")
        return (
            f"{self._file}: {self.part.name} cannot take its input {error.field}{made} as it {problem}. "
            "The files of this checkpoint do not fit together: take all from the same checkpoint, or correct the one "
            "that is wrong"
        )


def _check_values(tensor: Tensor, array: Array) -> None:
    """Raises InvalidInput for a whole number outside the range of the tensor, such as a token without an embedding."""
    if tensor.values == "below" and np.issubdtype(array.dtype, np.integer) and array.size:
        largest = int(array.max())
        if largest >= tensor.limit:
            raise InvalidInput(tensor.name, f"holds {largest}, expected numbers below {tensor.limit}")


def _check_output(part: str, file: Path, tensor: Tensor, shape: tuple[int, ...], lengths: Mapping[str, int]) -> None:
    expected = [lengths.get(dim.name) if isinstance(dim, Dim) else dim for dim in tensor.dims]
    if len(shape) != len(expected) or any(
        length not in (None, actual) for length, actual in zip(expected, shape, strict=True)
    ):
        wanted = ", ".join("any" if length is None else str(length) for length in expected)
        raise UnsupportedModel(
            f"{file} describes a {part} whose {tensor.name} has shape [{', '.join(map(str, shape))}], expected "
            f"[{wanted}]: "
            "a model of that kind cannot be built. docs/compatibility.md lists what can"
        )
