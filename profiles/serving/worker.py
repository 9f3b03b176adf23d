"""The worker that sends loads to a server of ours: `python -m profiles.serving.worker JOB`. It starts the server from a
bundle, or connects to one that runs.

A server that requires TLS or a token is reached with the variables of every command, such as ENGINECAST_CA and
ENGINECAST_TOKEN.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from pydantic import JsonValue

from calibration.ground import machine
from profiles.protocol import Channel, Hello, Metric
from profiles.serving.load import Load, Refused, observe
from profiles.task import Requests, profile_tasks
from runtime.bundle.manifest import Bundle, Frozen
from runtime.errors import BundleError, ResourceExhausted, Unavailable
from serving.cli.options import ConnectionOptions
from serving.dialects.python.client import Client
from serving.enginecast_pb import model_pb2

THROUGHPUT: Final = "served_throughput"
QUEUE: Final = 1024
"""Requests that wait at most at a server started here: an open load may bring more than it can answer."""
GRACE: Final = 10.0
"""Seconds that a server started here gets to end."""
POLL: Final = 0.05


class Job(Frozen):
    """What to load: a bundle and the options of the server that is started for it, or the address of a server and the
    name that the bundle has there. `settings` are those of the task's requests.
    """

    bundle: Path
    address: str | None = None
    model: str = ""
    target: str | None = None
    threads: int = 0
    parallel: int = 8
    settings: Mapping[str, JsonValue] = {}


def main() -> None:
    """Load the server as requested until the input ends."""
    channel = Channel()
    with ExitStack() as stack:
        try:
            job = Job.model_validate_json(sys.argv[1])
            start = time.perf_counter()
            bundle = Bundle(job.bundle)
            requests = requests_of(bundle, job.settings)
            model = job.model or bundle.name
            address = job.address or stack.enter_context(started(job, model))
            status = ready(address, model)
            clients = stack.enter_context(Clients(address, model, requests))
        except Exception as error:  # the driver shows it
            channel.fail(error)
            sys.exit(1)
        numbers = itertools.count()
        channel.answer(
            hello(bundle, job, status, requests, time.perf_counter() - start),
            lambda line: observe(Load.parse(line), clients.send, numbers),
        )


def requests_of(bundle: Bundle, settings: Mapping[str, JsonValue]) -> Requests:
    """The requests that the bundle's server is loaded with. Raises BundleError where its task has none."""
    task = profile_tasks()[bundle.manifest.task]
    if task.load is None:
        raise BundleError(f"servers of the task {task.task} cannot be measured under load")
    return task.load(bundle, task.settings.model_validate(dict(settings)))


@contextmanager
def started(job: Job, model: str) -> Iterator[str]:
    """The address of a server of the bundle, which ends with the block."""
    options = ["--address", "127.0.0.1:0", "--parallel", str(job.parallel), "--max-queue", str(QUEUE)]
    options += ["--threads", str(job.threads), *(["--target", job.target] if job.target else [])]
    command = [sys.executable, "-m", "serving.cli.commands", "serve", f"{model}={job.bundle.resolve()}", *options]
    with TemporaryFile("w+") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            if not line:
                log.seek(0)
                raise Unavailable(f"the server did not start: {log.read()[-1000:].strip()}")
            yield line.split()[-1]
        finally:
            server.terminate()
            try:
                server.wait(GRACE)
            except subprocess.TimeoutExpired:
                server.kill()


def ready(address: str, model: str) -> model_pb2.Model:
    """The status of the model, as soon as it is ready. Raises NotFound, Unavailable and the errors of loading."""
    with connect(address, model) as client:
        while (status := _status(client)).state == model_pb2.MODEL_STATE_LOADING:
            time.sleep(POLL)
        return status if status.state == model_pb2.MODEL_STATE_READY else client.load()


def _status(client: Client) -> model_pb2.Model:
    """The status of the client's model, an empty one if there is none with that name."""
    return next((model for model in client.models() if model.name == client.model), model_pb2.Model())


def connect(address: str, model: str) -> Client:
    """A client with a connection of its own. Requests are sent once: what a server refuses counts."""
    variables = {one.name: os.environ.get(f"ENGINECAST_{one.name.upper()}") for one in fields(ConnectionOptions)}
    options: dict[str, Any] = {name: value for name, value in variables.items() if value}
    return Client(address, model, attempts=1, **options | {"tls": bool(options.get("tls"))})


class Clients:
    """Connections to a server: as many as there are requests at once."""

    def __init__(self, address: str, model: str, requests: Requests) -> None:
        self._address, self._model, self._requests = address, model, requests
        self._all: list[Client] = []
        self._free: queue.LifoQueue[Client] = queue.LifoQueue()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._all:
            client.close()

    def send(self, number: int, output: Any) -> float:
        """Send a request: `profiles.serving.load.Send`."""
        client = self._take()
        try:
            amount = 0.0
            for event in client.run(self._requests.request(number), list):
                if event.output:
                    output()
                amount += self._requests.amount(event)
            return amount
        except ResourceExhausted as error:
            raise Refused(str(error)) from None
        finally:
            self._free.put(client)

    def _take(self) -> Client:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            client = connect(self._address, self._model)
            self._all.append(client)
            return client


def hello(bundle: Bundle, job: Job, status: model_pb2.Model, requests: Requests, load: float) -> Hello:
    """The first message."""
    return Hello(
        program=f"{machine.program()} served",
        target=status.target,
        device=status.device,
        threads=job.threads or machine.threads(),
        versions=machine.versions("grpcio"),
        load=load,
        metrics={THROUGHPUT: Metric(unit=requests.unit, settings=dict(requests.settings))},
        quant=bundle.manifest.quant,
    )


if __name__ == "__main__":
    main()
