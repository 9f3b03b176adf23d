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
from serving.host.states import ModelState, Status

VERSION: Final = "1"
"""The version of every model."""
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


def names_of(host: ModelHost, name: str) -> tuple[str, str]:
    """The model and the submodel of a name, the submodel empty if it names a whole model. Raises NotFound."""
    limits.MODEL_NAME.length("model_name", name)
    models = [status.name for status in host.statuses()]
    if name in models:
        return name, ""
    model, _, submodel = name.rpartition("/")
    if model not in models:
        raise NotFound(f"model {quoted(name)} is not served here: {did_you_mean(model or name, models)}")
    return model, submodel


def submodel_of(host: ModelHost, name: str) -> tuple[str, str]:
    """The model and the submodel of a name. Raises NotFound, and InvalidInput for the name of a whole model."""
    model, submodel = names_of(host, name)
    if not submodel:
        known = ", ".join(f"{model}/{one}" for one in callable_submodels(host.engines(model)))
        raise InvalidInput("model_name", f"{quoted(name)} is a model of several networks, name one of them: {known}")
    return model, submodel


def check_version(given: str) -> None:
    """Raise NotFound unless a version is unset or the one that there is."""
    limits.MODEL_NAME.length("model_version", given)
    if given not in ("", VERSION):
        raise NotFound(f"version {quoted(given)} does not exist: every model has the one version {VERSION}")


def whole_model(host: ModelHost, repository: str, name: str) -> str:
    """The name of a model to load or unload. Raises NotFound, and InvalidInput for a submodel or another repository."""
    check_repository(repository)
    model, submodel = names_of(host, name)
    if submodel:
        raise InvalidInput("model_name", f"{quoted(name)} is a submodel, expected {model}: they are loaded together")
    return model


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
            check_version(request.version)
            return pb.ModelReadyResponse(ready=self._usable(*names_of(self.host, request.name)))
        except NotFound:
            return pb.ModelReadyResponse(ready=False)

    def _usable(self, model: str, submodel: str) -> bool:
        """Whether requests run now. The submodels of a model that its next request loads are not known yet."""
        loaded = self.host.status(model).state is ModelState.READY
        return self.host.ready()[model] is not None and not (loaded and submodel not in ("", *self.host.engines(model)))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="enginecast", version=version("enginecast"), extensions=["model_repository"]
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        check_version(request.version)
        model, submodel = submodel_of(self.host, request.name)
        engines = self.host.engines(model)
        signature = callable_signature(engines, submodel)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=engines[submodel].target,
            inputs=tensors.metadata(signature.inputs),
            outputs=tensors.metadata(signature.outputs),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        check_version(request.model_version)
        model, submodel = submodel_of(self.host, request.model_name)
        timeout = timeout_of(request, context.time_remaining())
        large = request.ByteSize() > LARGE
        work = await asyncio.to_thread(inference, request, submodel) if large else inference(request, submodel)
        request.ClearField("raw_input_contents")  # keep only one copy
        response = pb.ModelInferResponse()
        async with aclosing(self.host.run(model, work, timeout, current_client())) as events:
            async for event in events:
                if isinstance(event, Inferred):
                    response = await asyncio.to_thread(tensors.response, event.outputs)
                elif isinstance(event, Done):
                    describe(response, event)
        response.model_name, response.model_version, response.id = request.model_name, VERSION, request.id
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
        names = [status.name, *(f"{status.name}/{submodel}" for submodel in submodels)]
        entry = pb.RepositoryIndexResponse.ModelIndex
        return [entry(name=name, version=VERSION, state=STATES[status.state], reason=reason) for name in names]

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        tensors.refuse_parameters("request", request.parameters)
        await self.host.load(whole_model(self.host, request.repository_name, request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        tensors.refuse_parameters("request", request.parameters, ("unload_dependents",))
        await self.host.unload(whole_model(self.host, request.repository_name, request.model_name))
        return pb.RepositoryModelUnloadResponse()
