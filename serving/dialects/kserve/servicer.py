"""inference.GRPCInferenceService, the Open Inference Protocol v2 of KServe and Triton, for a `ModelHost`.

A model of the protocol is a submodel, `MODEL/SUBMODEL`; loading and readiness are those of whole models.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, Final

from runtime import limits
from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from serving.dialects.grpc.health import health_of
from serving.dialects.grpc.status import Context
from serving.dialects.kserve import tensors
from serving.enginecast_pb import inference_pb2 as pb
from serving.enginecast_pb import inference_pb2_grpc
from serving.host.inference import Inference, Inferred, callable_signature, callable_submodels
from serving.host.job import Done, EngineUse
from serving.host.models import ModelHost
from serving.host.observing import current_client
from serving.host.offers import VERSION_MARK
from serving.host.states import ModelState, Status

ONLY: Final = "1"
"""The version of a model without versions."""
LARGE: Final = 1 << 16
"""Messages with more bytes are converted in a thread."""
STATES: Final = {
    ModelState.READY: "READY",
    ModelState.LOADING: "LOADING",
    ModelState.UNLOADING: "UNLOADING",
    ModelState.UNLOADED: "UNAVAILABLE",
    ModelState.FAILED: "UNAVAILABLE",
}
"""The protocol's name of each state."""
TIMEOUT: Final = "timeout"
MICROSECONDS: Final = 1e-6


def find(host: ModelHost, name: str, version: str = "") -> tuple[Status, str]:
    """The model of a name and a version, and the submodel, empty if the name is that of a whole model. Raises NotFound,
    InvalidInput.
    """
    limits.MODEL_NAME.length("model_name", name)
    limits.MODEL_NAME.length("model_version", version)
    models = {status.name: status for status in host.statuses()}
    names = {*models, *map(base, models.values())}
    model, _, submodel = (name, "", "") if name in names else name.rpartition("/")
    status = models.get(f"{model}{VERSION_MARK}{version}") or host.status(model or name)
    if version not in ("", version_of(status)):
        versions = [version_of(one) for one in models.values() if base(one) == base(status)]
        if version in versions:
            raise InvalidInput("model_version", f"is {version}, and the name has {status.version}: give one of the two")
        raise NotFound(f"version {quoted(version)} of {base(status)} does not exist: {did_you_mean(version, versions)}")
    return status, submodel


def base(status: Status) -> str:
    """The name of a model without its version."""
    return status.name.removesuffix(f"{VERSION_MARK}{status.version}") if status.version else status.name


def version_of(status: Status) -> str:
    """The version of a model; "1" of one without versions."""
    return status.version or ONLY


def find_submodel(host: ModelHost, name: str, version: str) -> tuple[Status, str]:
    """The model and the submodel of a name and a version. Raises NotFound, InvalidInput for a whole model."""
    status, submodel = find(host, name, version)
    if not submodel:
        known = ", ".join(f"{base(status)}/{one}" for one in callable_submodels(host.engines(status.name)))
        raise InvalidInput("model_name", f"{quoted(name)} is a model of several networks, name one of them: {known}")
    return status, submodel


def find_whole(host: ModelHost, repository: str, name: str) -> str:
    """The model to load or unload. Raises NotFound, and InvalidInput for a submodel or another repository."""
    check_repository(repository)
    status, submodel = find(host, name)
    if submodel:
        raise InvalidInput(
            "model_name", f"{quoted(name)} is a submodel, expected {base(status)}: they are loaded together"
        )
    return name


def check_repository(name: str) -> None:
    """Raise InvalidInput for the name of a repository: there is one, without a name."""
    limits.MODEL_NAME.length("repository_name", name)
    if name:
        raise InvalidInput("repository_name", f"{quoted(name)} is not known: leave it empty")


def inference(message: pb.ModelInferRequest, submodel: str) -> Inference:
    """Convert a request. Raises InvalidInput."""
    limits.INFER_TENSORS.length("outputs", message.outputs)
    limits.MODEL_NAME.length("id", message.id)
    names = []
    for i, output in enumerate(message.outputs):
        tensors.refuse_parameters(f"outputs[{i}]", output.parameters)
        limits.MODEL_NAME.length(f"outputs[{i}].name", output.name)
        if output.name in names:
            raise InvalidInput(f"outputs[{i}]", f"is {quoted(output.name)} for the second time")
        names.append(output.name)
    return Inference(submodel, tensors.arrays(message), tuple(names))


def timeout_of(message: pb.ModelInferRequest, remaining: float | None) -> float | None:
    """Seconds until a request ends: the call's own deadline, or the parameter `timeout` if that is sooner."""
    tensors.refuse_parameters("request", message.parameters, (TIMEOUT,))
    if TIMEOUT not in message.parameters:
        return remaining
    microseconds = message.parameters[TIMEOUT].int64_param
    if microseconds < 1:
        raise InvalidInput(TIMEOUT, f"is {microseconds}, expected microseconds as an int64_param of 1 or more")
    seconds = microseconds * MICROSECONDS
    return seconds if remaining is None else min(seconds, remaining)


def describe(response: pb.ModelInferResponse, done: Done) -> None:
    """Add the times of a request, and what really ran it, to the response."""
    for name in ("queue_seconds", "run_seconds"):
        response.parameters[name].double_param = getattr(done, name)
    use: EngineUse
    for use in done.engines:
        for name in ("target", "device", "precision"):
            response.parameters[name].string_param = getattr(use, name)


class InferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, host: ModelHost) -> None:
        self.host = host

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=health_of(self.host)[""])

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            return pb.ModelReadyResponse(ready=self._usable(*find(self.host, request.name, request.version)))
        except NotFound:
            return pb.ModelReadyResponse(ready=False)

    def _usable(self, status: Status, submodel: str) -> bool:
        """Whether requests run now. The submodels of a model that its next request loads are not known yet."""
        if status.state is ModelState.READY and submodel not in ("", *self.host.engines(status.name)):
            return False
        return self.host.ready()[status.name] is not None

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="enginecast", version=version("enginecast"), extensions=["model_repository"]
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        status, submodel = find_submodel(self.host, request.name, request.version)
        engines = self.host.engines(status.name)
        signature = callable_signature(engines, submodel)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[version_of(one) for one in self.host.statuses() if base(one) == base(status)],
            platform=engines[submodel].target,
            inputs=tensors.metadata(signature.inputs),
            outputs=tensors.metadata(signature.outputs),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        status, submodel = find_submodel(self.host, request.model_name, request.model_version)
        timeout = timeout_of(request, context.time_remaining())
        large = request.ByteSize() > LARGE
        work = await asyncio.to_thread(inference, request, submodel) if large else inference(request, submodel)
        request.ClearField("raw_input_contents")  # keep only one copy
        response = pb.ModelInferResponse()
        async with aclosing(self.host.run(status.name, work, timeout, current_client())) as events:
            async for event in events:
                if isinstance(event, Inferred):
                    response = await asyncio.to_thread(tensors.response, event.outputs)
                elif isinstance(event, Done):
                    describe(response, event)
        response.model_name, response.model_version, response.id = request.model_name, version_of(status), request.id
        return response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        check_repository(request.repository_name)
        found = [one for status in self.host.statuses() for one in self._index(status)]
        return pb.RepositoryIndexResponse(models=[one for one in found if one.state == "READY" or not request.ready])

    def _index(self, status: Status) -> list[Any]:
        """A model, and the submodels that can be called if it is ready."""
        reason = "" if STATES[status.state] != "UNAVAILABLE" else status.error or status.state.value
        reason += ": the next request loads it" if status.on_demand else ""
        ready = status.state is ModelState.READY
        submodels = callable_submodels(self.host.engines(status.name)) if ready else ()
        names = [base(status), *(f"{base(status)}/{submodel}" for submodel in submodels)]
        entry = pb.RepositoryIndexResponse.ModelIndex
        return [
            entry(name=name, version=version_of(status), state=STATES[status.state], reason=reason) for name in names
        ]

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        tensors.refuse_parameters("request", request.parameters)
        await self.host.load(find_whole(self.host, request.repository_name, request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        tensors.refuse_parameters("request", request.parameters, ("unload_dependents",))
        await self.host.unload(find_whole(self.host, request.repository_name, request.model_name))
        return pb.RepositoryModelUnloadResponse()
