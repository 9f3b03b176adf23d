"""What the ingress and the replicas of a cluster send each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime import errors
from runtime.errors import EnginecastError, InvalidInput
from serving.host.states import Status


@dataclass(frozen=True)
class Call:
    """A request for a replica: the serialized `message` of a task's service. It may take `timeout` seconds. `id`,
    `method`, `client` and `traceparent` are those of the `Record` of the client's call.
    """

    task: str
    message: bytes
    timeout: float | None
    id: str
    method: str
    client: str
    traceparent: str


@dataclass(frozen=True)
class Part:
    """A serialized response. `first` is true for the first one of a request, and `output` once a part of the result was
    sent.
    """

    message: bytes
    first: bool
    output: bool


@dataclass(frozen=True)
class Failure:
    """The error that ended a request. Raised in a replica, it would reach the ingress with a stack trace."""

    kind: str
    message: str
    field: str
    reason: str
    retry_seconds: float | None

    @classmethod
    def of(cls, error: EnginecastError) -> Failure:
        field, reason = (error.field, error.reason) if isinstance(error, InvalidInput) else ("", "")
        return cls(type(error).__name__, str(error), field, reason, error.retry_seconds)

    def error(self) -> EnginecastError:
        """The error again."""
        kind: type[EnginecastError] = getattr(errors, self.kind, EnginecastError)
        error = kind.__new__(kind, self.message)  # some constructors take the parts of a message
        if isinstance(error, InvalidInput):
            error.field, error.reason = self.field, self.reason
        error.retry_seconds = self.retry_seconds
        return error


@dataclass(frozen=True)
class Overview:
    """The models of a cluster. Each of those `named` on the command line has an application of its own, the others are
    in that of the `repository`, if there is one. `statuses` are of all models, sorted by name. While the cluster is
    `stopping`, requests are refused.
    """

    named: Sequence[str] = ()
    repository: bool = False
    statuses: Sequence[Status] = ()
    stopping: bool = False
