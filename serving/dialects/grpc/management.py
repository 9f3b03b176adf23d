"""ModelService: the states of a host's models, and their changes. JobService: requests by their ids."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version

from runtime import limits
from runtime.placing.memory import of_process
from runtime.scripting import Scripts
from serving.dialects.grpc import messages
from serving.dialects.grpc.status import Context
from serving.enginecast_pb import job_pb2, job_pb2_grpc, model_pb2, model_pb2_grpc
from serving.host.models import ModelHost
from serving.host.states import Models


class ModelReader(model_pb2_grpc.ModelServiceServicer):
    """The methods that read. The others are not there."""

    def __init__(self, models: Models, scripts: Scripts | None = None) -> None:
        self.models, self.scripts = models, scripts or Scripts()
        self._began = time.monotonic()

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=self._models())

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=self._model(request.name))

    async def Status(self, request: model_pb2.StatusRequest, context: Context) -> model_pb2.StatusResponse:
        return model_pb2.StatusResponse(
            version=version("enginecast"),
            uptime_seconds=time.monotonic() - self._began,
            memory_bytes=of_process() or 0,
            stopping=self.models.stopping,
            models=self._models(),
        )

    async def ListScripts(
        self, request: model_pb2.ListScriptsRequest, context: Context
    ) -> model_pb2.ListScriptsResponse:
        found = await asyncio.to_thread(self.scripts.listed)  # it may import them
        return model_pb2.ListScriptsResponse(scripts=map(messages.script_info, found))

    def _models(self) -> list[model_pb2.Model]:
        return [messages.model(status) for status in self.models.statuses()]

    def _model(self, name: str) -> model_pb2.Model:
        return messages.model(self.models.status(name))


class ModelServicer(ModelReader):
    """Translates, and delegates to the host."""

    def __init__(self, host: ModelHost) -> None:
        super().__init__(host, host.scripts)
        self.host = host

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        target = request.target if request.HasField("target") else None
        await self.host.load(request.name, target, messages.keep_alive(request))
        return model_pb2.LoadModelResponse(model=self._model(request.name))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        await self.host.unload(request.name, messages.grace(request))
        return model_pb2.UnloadModelResponse(model=self._model(request.name))

    async def ReloadModel(
        self, request: model_pb2.ReloadModelRequest, context: Context
    ) -> model_pb2.ReloadModelResponse:
        await self.host.reload(request.name)
        return model_pb2.ReloadModelResponse(model=self._model(request.name))


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Translates, and delegates to the host."""

    def __init__(self, host: ModelHost) -> None:
        self.host = host

    async def Stop(self, request: job_pb2.StopRequest, context: Context) -> job_pb2.StopResponse:
        limits.JOB_ID.length("id", request.id)
        self.host.stop(request.id)
        return job_pb2.StopResponse()
