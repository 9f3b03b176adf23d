"""One call of one submodel as a request: it waits, runs, ends and is counted like the requests of the model's task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from runtime import limits
from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor, nbytes
from runtime.engine import Engine
from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from runtime.pipeline import Call, Event, Pipeline
from runtime.scripting import Scripts
from runtime.task import Request
from serving.host.job import Model

ANY: Final = ""
"""The task of requests that models of every task run."""


@dataclass(frozen=True)
class Inference(Request):
    """Run `submodel` once on these inputs. `outputs` names those to return, in order; empty: all of them."""

    task: ClassVar[str] = ANY
    submodel: str
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.inputs.values())

    def pipeline(self, engines: Mapping[str, Engine]) -> Pipeline:
        """Check the request and return the generator that runs it. Raises NotFound for the submodel, and InvalidInput
        that names the tensor.
        """
        signature = callable_signature(engines, self.submodel)
        lengths = signature.bind(self.inputs)
        _check_lengths(signature, lengths)
        for tensor in signature.inputs:
            _check_values(tensor, self.inputs[tensor.name])
        known = [tensor.name for tensor in signature.outputs]
        for name in self.outputs:
            if name not in known:
                raise InvalidInput("outputs", f"has no {quoted(name)}: {did_you_mean(name, known)}")
        return self._run(self.outputs or tuple(known))

    def _run(self, names: tuple[str, ...]) -> Pipeline:
        outputs = yield Call(self.submodel, self.inputs)
        assert outputs is not None, "a driver answers a call with its outputs"
        yield Inferred({name: outputs[name] for name in names})


@dataclass(frozen=True)
class Inferred(Event):
    """The outputs of an `Inference`, by name in the order of the request."""

    output: ClassVar[bool] = True
    outputs: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.outputs.values())


def pipeline_of(model: Model, request: Request, scripts: Scripts) -> Pipeline:
    """The generator that runs a request on a model, with its scripts. Raises InvalidInput."""
    if isinstance(request, Inference):
        return request.pipeline(model.engines)
    return scripts.open(model.pipeline, request)


def callable_submodels(engines: Mapping[str, Engine]) -> Iterator[str]:
    """The submodels that can be called by themselves: those that keep no states between calls."""
    return (name for name, engine in engines.items() if not engine.submodel.signature.states)


def callable_signature(engines: Mapping[str, Engine], submodel: str) -> Signature:
    """The signature of a submodel that can be called by itself. Raises NotFound, and InvalidInput for decoders."""
    if submodel not in engines:
        raise NotFound(f"submodel {quoted(submodel)} is not part of the model: {did_you_mean(submodel, engines)}")
    signature = engines[submodel].submodel.signature
    if signature.states:
        raise InvalidInput(
            "model_name",
            f"{quoted(submodel)} is a decoder, whose caches belong to one conversation: request an answer of the whole "
            "model, from the service of its task",
        )
    return signature


def _check_lengths(signature: Signature, lengths: Mapping[str, int]) -> None:
    """Raise InvalidInput for lengths that contradict each other, or that need more memory than any request of the
    model's task.
    """
    for name, length in signature.complete(lengths).items():
        if lengths.get(name, length) != length:
            raise InvalidInput("inputs", f"have {name} {lengths[name]}, expected {length} of the other lengths")
    pictures = [tensor for tensor in signature.inputs if tensor.dtype.startswith("float")]
    free = {dim.name: dim for tensor in pictures for dim in tensor.dims if isinstance(dim, Dim) and not dim.sum_of}
    most = math.prod(dim.opt if dim.name == BATCH.name else dim.max for dim in free.values())
    count = math.prod(lengths[name] for name in free)
    if len(free) > 1 and count > most:
        raise InvalidInput("inputs", f"are too large: {' x '.join(free)} is {count:,}, expected at most {most:,}")
    _check_outputs(signature, lengths)


def _check_outputs(signature: Signature, lengths: Mapping[str, int]) -> None:
    whole = signature.complete(lengths)
    known = [t for t in signature.outputs if all(d.name in whole for d in t.dims if isinstance(d, Dim))]
    limits.INFER_OUTPUT.count("outputs", nbytes(known, whole))


def _check_values(tensor: Tensor, array: Array) -> None:
    """Raise InvalidInput for indices outside of their table: some kernels read whatever lies there."""
    if tensor.limit and array.size and np.issubdtype(array.dtype, np.integer):
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= tensor.limit:
            raise InvalidInput(tensor.name, f"has values from {least} to {most}, expected 0 to {tensor.limit - 1}")
