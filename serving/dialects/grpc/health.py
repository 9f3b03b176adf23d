"""grpc.health.v1 for the models of a server. Every response is computed from their current states; nothing is stored.

The servicer of grpcio-health-checking shares one condition among the watchers of a service: a watcher that does not
read delays every change of state, and one that disconnects ends the other streams.
"""

from __future__ import annotations

from typing import Final

from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime import limits
from runtime.errors import NotFound, quoted
from serving.dialects.grpc.status import Context, Sending
from serving.dialects.grpc.task import MODEL, grpc_tasks
from serving.host.states import Models

Response: Final = health_pb2.HealthCheckResponse


def health_of(host: Models) -> dict[str, bool]:
    """Whether each health service is serving: a model's name, if it is ready; a task's service, if a model of the task
    is ready; "" (the server), if any model is ready.
    """
    tasks = host.ready()
    models = {name: task is not None for name, task in tasks.items()}
    known = set(tasks.values())
    services = {task.service.full_name: name in known for name, task in grpc_tasks().items()}
    return models | services | {"": any(models.values()), MODEL: not host.stopping}


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    def __init__(self, host: Models) -> None:
        self.host = host

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        limits.MODEL_NAME.length("service", request.service)
        serves = health_of(self.host).get(request.service)
        if serves is None:
            raise NotFound(f"health service {quoted(request.service)} is not known")
        return Response(status=Response.SERVING if serves else Response.NOT_SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        limits.MODEL_NAME.length("service", request.service)
        shown = None
        with Sending(context) as write:
            while True:
                changed = self.host.changed
                serves = health_of(self.host).get(request.service)
                status = (
                    Response.SERVICE_UNKNOWN if serves is None else Response.SERVING if serves else Response.NOT_SERVING
                )
                if status != shown:
                    await write(Response(status=status))
                shown = status
                await changed.wait()
