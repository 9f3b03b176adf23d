"""A client for one model of a server, with the methods of a loaded bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from runtime.pipeline import Event
from runtime.task import Request
from serving.dialects.grpc import client as grpc
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.task import grpc_tasks
from serving.dialects.python.session import Session
from serving.dialects.python.stream import Stream
from serving.enginecast_pb import model_pb2

R = TypeVar("R")


class Client(Session):
    """A connection to a server at "host:port", for requests to one of its models. A `with` block closes it.

        with enginecast.Client("127.0.0.1:50051", model="mine") as client:
            client.generate("a red fox in the snow").save("fox.png")

    A request that ends with Unavailable before its first event is sent again, after waits that grow and vary at random.

    Args:
        address: "host:port" of `enginecast serve`.
        model: Name of the model, as the server lists it (`models`).
        timeout: Seconds that a request may take, waiting and loading included; DeadlineExceeded is raised then. None is
            no limit.
        keep_alive: Seconds that the model stays loaded after a request if no other uses it, 0 to 604,800; -1 is until
            another model needs its memory. None is what the server has (`enginecast serve --keep-alive`).
        token: A bearer token for a server that requires one. It is sent with TLS, or on loopback only.
        ca: PEM file of the certificate authority that the server's certificate must be of. Switches TLS on.
        cert: PEM file of a certificate of this client, for servers that require one (mutual TLS).
        key: PEM file of its private key.
        tls: Connect with TLS and trust the public authorities.
        attempts: How often a request is sent at most, 1 to 5.
        backoff: Seconds before the second attempt; they double with each further one.

    Raises:
        InvalidInput: An option is wrong, or the token would travel unencrypted.
        NotFound: A file does not exist.
    """

    def __init__(
        self,
        address: str,
        model: str = "",
        *,
        timeout: float | None = None,
        keep_alive: float | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        tls: bool = False,
        attempts: int = Connection.attempts,
        backoff: float = Connection.backoff,
    ) -> None:
        self.model = model
        self.timeout = timeout
        self.keep_alive = keep_alive
        self._client = grpc.Client(address, Connection(ca, cert, key, token, tls, attempts, backoff))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def models(self) -> list[model_pb2.Model]:
        """Every model of the server as a protobuf message: its `name`, `state`, `kind`, `target`, `device` and more.

        Raises Unavailable if no server answers.
        """
        return self._client.models(self.timeout)

    def load(self, target: str | None = None) -> model_pb2.Model:
        """Load the model on the server and wait until it is ready. Raises NotFound and the errors of loading."""
        return self._client.load(self.model, target, self.timeout, self.keep_alive)

    def reload(self) -> model_pb2.Model:
        """Load the bundle that is in the model's folder on the server now, and wait until it is ready.

        The model serves meanwhile, and goes on if that fails. Raises NotFound, Unavailable while it changes otherwise,
        ResourceExhausted without memory for both, and the errors of loading.
        """
        return self._client.reload(self.model, self.timeout)

    def unload(self, grace_seconds: float | None = None) -> model_pb2.Model:
        """Unload the model and wait until its engines are freed. Running requests get `grace_seconds` to finish, and
        further ones do not load it.
        """
        return self._client.unload(self.model, grace_seconds, self.timeout)

    def close(self) -> None:
        """Cancel running requests and disconnect."""
        self._client.close()

    def run(self, request: Request, collect: Callable[[Sequence[Event]], R]) -> Stream[R]:
        """The stream of a request of any task, sent to the server; `collect` makes the result of its events."""
        task = grpc_tasks()[request.task]
        message: Any = task.message(self.model, request)
        if self.keep_alive is not None:
            message.keep_alive_seconds = self.keep_alive
        responses = self._client.stream(task.method, message, self.timeout)
        return Stream(task.events(responses), responses.close, collect)
