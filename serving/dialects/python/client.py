"""A client for one model of a server, with the methods of a loaded bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message_factory import GetMessageClass

from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.pipeline import Event
from runtime.task import Request
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from serving.dialects.grpc import client as grpc
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.messages import scripts_message, terms_message
from serving.dialects.grpc.task import grpc_tasks
from serving.dialects.python import results
from serving.dialects.python.results import Answer, Drawing
from serving.dialects.python.session import Session
from serving.dialects.python.stream import Stream
from serving.enginecast_pb import common_pb2, model_pb2
from serving.host.terms import Priority, Terms

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
        priority: "urgent", "normal" or "background": how soon requests run, and their share of the engines.
        finish: Let requests go on when this client disconnects; `collect_drawing` and `collect_answer` get their
            results.
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
        priority: str = "normal",
        finish: bool = False,
        token: str | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        tls: bool = False,
        attempts: int = Connection.attempts,
        backoff: float = Connection.backoff,
    ) -> None:
        self.address = address
        self.model = model
        self.timeout = timeout
        self.keep_alive = keep_alive
        self._terms = Terms(keep_alive, _priority(priority), finish)
        self._client = grpc.Client(address, Connection(ca, cert, key, token, tls, attempts, backoff))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> str:
        """The address of the server and the name of the model."""
        return f"{self.address} {self.model}"

    def models(self) -> list[model_pb2.Model]:
        """Every model of the server as a protobuf message: its `name`, `state`, `kind`, `target`, `device` and more.

        Raises Unavailable if no server answers.
        """
        return self._client.models(self.timeout)

    def installed_scripts(self) -> list[model_pb2.ScriptInfo]:
        """Every script that requests may name, as a protobuf message: its `name`, `summary`, `tasks` and the JSON
        schema of its arguments. Raises Unavailable if no server answers.
        """
        return self._client.scripts(self.timeout)

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
        request = self._with_scripts(request)
        message: Any = task.message(self.model, request)
        if request.scripts:
            message.scripts.extend(scripts_message(request.scripts))
        if self._terms != Terms():
            message.terms.CopyFrom(terms_message(self._terms))
        responses = self._client.stream(task.method, message, self.timeout)
        return Stream(task.events(responses), responses.close, collect)

    def collect_drawing(self, id: str) -> Stream[Drawing]:
        """The stream of a request for pictures that goes on without the client that sent it (`finish`), from its first
        event on. `id` is that of its `Queued`. Raises NotFound when it was read, or ended more than 10 minutes ago.
        """
        return self._collect(ImageRequest.task, id, results.drawing)

    def collect_answer(self, id: str) -> Stream[Answer]:
        """The same of a request for an answer."""
        return self._collect(ChatRequest.task, id, results.answer)

    def stop(self, id: str) -> None:
        """Stop a request before its next step. `id` is that of its `Queued`. Raises NotFound when it has ended."""
        self._client.stop(id, self.timeout)

    def _collect(self, name: str, id: str, collect: Callable[[Sequence[Event]], R]) -> Stream[R]:
        task = grpc_tasks()[name]
        message: Any = GetMessageClass(task.method.input_type)(terms=common_pb2.Terms(collect=id))
        responses = self._client.stream(task.method, message, self.timeout)
        return Stream(task.events(responses), responses.close, collect)


def _priority(name: str) -> Priority:
    known = {priority.name.lower(): priority for priority in Priority}
    if name not in known:
        raise InvalidInput("priority", f"is {quoted(name)}: {did_you_mean(name, known)}")
    return known[name]
