"""What `enginecast serve --engine ray` does: it starts Ray Serve's ingress with our services, and an application for
each model.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig, gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig, ProxyStatus

from runtime.errors import InvalidInput, Unavailable
from serving.cli.offered import offers, repository
from serving.cluster import options
from serving.cluster.board import Board
from serving.cluster.ingress import add_local_services, add_services
from serving.cluster.replica import Replica
from serving.cluster.routing import Affinity
from serving.cluster.view import BOARD, LOOK_SECONDS, REPOSITORY
from serving.host.offers import Offer, check_name
from serving.host.shown import concealed
from serving.host.states import ModelState, Status
from serving.security.addresses import is_loopback, split
from serving.settings import Settings

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
AUTO: Final = "auto"
"""The address of a cluster that this machine belongs to."""
REACH_SECONDS: Final = 5.0
"""Longest time to connect to a cluster."""
BOARD_SECONDS: Final = 5.0
"""Longest time to wait for the board."""
START_SECONDS: Final = 120.0
"""Longest time until the ingress accepts calls."""
SCALE_UP_SECONDS: Final = 3.0
"""More requests than the replicas should have, for this time, start another one."""
LOOK_BACK_SECONDS: Final = 12.0
"""The load is averaged over this time. Ray measures it every 10 seconds."""
ROUND_SECONDS: Final = 0.05
"""While all replicas are busy, the ingress looks for a free one this often."""
STOPPING_SECONDS: Final = 10.0
"""Time for a replica to stop after its last request."""
SEPARATOR: Final = "#"
"""Stands between the parts of the names that Ray gives its processes."""
QUIET: Final = LoggingConfig(enable_access_log=False)
"""Replicas log requests as a server of one process does."""

Announce = Callable[[str], None]


def start(settings: Settings, announce: Announce) -> None:
    """Serve on a cluster until SIGINT or SIGTERM. `announce` is called with a line when calls are accepted, and with
    one for each model when it is ready or fails.

    Raises InvalidInput for settings that a cluster does not have, and Unavailable if the cluster cannot be reached or
    already has an ingress.
    """
    options.check(settings)
    _reach(settings.ray_address)
    offered = offers(settings)
    repository(settings)  # a folder that is missing is reported before anything is started
    for offer in offered:
        _check_name(offer.name)
    with _cluster(settings.ray_address), _stopping() as stop, _ingress(settings.address) as port:
        announce(f"listening on {split(settings.address)[0]}:{port}")
        board = _deploy(settings, offered)
        _follow(board, announce, stop)
        log.info("stopping")
        _stop_models(board)


def _reach(address: str | None) -> None:
    """Raise InvalidInput for a cluster's address that is none, and Unavailable where nothing answers: Ray would try for
    minutes.
    """
    if address is None or address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput("ray_address", f"'{address}' is none, expected HOST:PORT such as 10.0.0.1:6379, or {AUTO}")
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise Unavailable(f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`") from None


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Joins a cluster, or starts one of this machine alone, which ends with the process. Raises Unavailable."""
    known = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", namespace="enginecast", **known)
    except ConnectionError as error:
        raise Unavailable(f"the Ray cluster {address} cannot be joined: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _ingress(address: str) -> Iterator[int]:
    """Starts Ray Serve with our services on the head node, and stops it with all of its applications. Gives its port:
    for port 0, one that is free on this machine.
    """
    if serve.status().proxies:
        raise Unavailable(
            "Ray Serve already runs on this cluster, and an ingress takes no further services: stop it with `serve "
            "shutdown`, or name another cluster"
        )
    _, port = split(address)
    port = port or _free_port()
    services = add_local_services if is_loopback(address) else add_services
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": LOOPBACK, "port": _free_port()},  # it has no routes
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[_path(services)]),
    )
    try:
        _wait_for_ingress(port)
        yield port
    finally:
        serve.shutdown()


def _wait_for_ingress(port: int) -> None:
    limit = time.monotonic() + START_SECONDS
    while ProxyStatus.HEALTHY not in serve.status().proxies.values():
        if time.monotonic() > limit:
            raise Unavailable(f"Ray's ingress did not start on port {port}: the logs of its process say why")
        time.sleep(0.2)


def _deploy(settings: Settings, offered: Sequence[Offer]) -> Any:
    """Start an application for each model, and one for the repository. Returns a handle of the board."""
    shared = serve.deployment(Board).options(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, logging_config=QUIET
    )
    known = [_status(offer, settings.min_replicas) for offer in offered]
    board = serve.run(shared.bind(known, settings.repository is not None), name=BOARD, route_prefix=None)
    own = replace(settings, repository=None, default_versions=None)
    targets = [
        _target(offer.name, offer.task, replace(own, bundles=[f"{offer.name}={offer.root.absolute()}"]), board)
        for offer in offered
    ]
    if settings.repository is not None:
        every = replace(settings, bundles=None, repository=settings.repository.absolute())
        targets.append(_target(REPOSITORY, None, every, board))
    serve.run_many(targets, wait_for_applications_running=False)
    return board


def _target(name: str, task: str | None, settings: Settings, board: Any) -> serve.RunTarget:
    """The application of a model or of the repository."""
    most = options.at_once(task, settings)
    deployment = serve.deployment(Replica).options(
        name=name,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            initial_replicas=max(1, settings.min_replicas),
            max_replicas=settings.max_replicas,
            target_ongoing_requests=most,
            upscale_delay_s=SCALE_UP_SECONDS,
            downscale_delay_s=settings.scale_down,
            look_back_period_s=LOOK_BACK_SECONDS,
        ),
        max_ongoing_requests=most,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.grace + STOPPING_SECONDS,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        logging_config=QUIET,
        request_router_config=RequestRouterConfig(
            request_router_class=_path(Affinity),
            initial_backoff_s=ROUND_SECONDS,
            max_backoff_s=ROUND_SECONDS,
        ),
    )
    return serve.RunTarget(deployment.bind(settings, board), name=name, route_prefix=None)


def _status(offer: Offer, replicas: int) -> Status:
    """The status of a model without a replica: one is being started, or if none always runs, a request starts one."""
    state = ModelState.FAILED if offer.error else ModelState.LOADING if replicas else ModelState.UNLOADED
    error = str(concealed(offer.error, offer.root, offer.name)) if offer.error else None
    return Status(offer.name, state, offer.quant, offer.task, None, None, error, 0, 0, on_demand=not replicas)


def _follow(board: Any, announce: Announce, stop: threading.Event) -> None:
    """Announce each model once, when it is ready or fails, until the server is stopped."""
    waiting = set(_models())
    while not stop.wait(LOOK_SECONDS):
        with suppress(RayError, RayServeException, TimeoutError):  # the board may be on its way to another node
            for name, line in _news(board, waiting) if waiting else ():
                announce(line)
                waiting.discard(name)


def _models() -> list[str]:
    """The applications of the models, and that of the repository."""
    return sorted(set(serve.status().applications) - {BOARD})


def _news(board: Any, waiting: Collection[str]) -> list[tuple[str, str]]:
    """What to announce of the applications that are waited for, each with its name."""
    statuses = {status.name: status for status in board.overview.remote().result(timeout_s=BOARD_SECONDS).statuses}
    applications = serve.status().applications
    lines = ((name, _line(name, statuses.get(name), applications[name])) for name in sorted(waiting))
    return [(name, line) for name, line in lines if line is not None]


def _stop_models(board: Any) -> None:
    """Refuse new requests, and let those that run finish, of all models at once. The board and the ingress end
    afterwards.
    """
    with suppress(RayError, RayServeException, TimeoutError):
        board.stop.remote().result(timeout_s=BOARD_SECONDS)
        time.sleep(LOOK_SECONDS)  # until the ingress has seen it
    names = _models()
    with ThreadPoolExecutor(max(1, len(names))) as threads:
        list(threads.map(serve.delete, names))


def _line(name: str, status: Status | None, application: Any) -> str | None:
    """What to announce of an application, None if there is nothing yet."""
    if application.status == ApplicationStatus.DEPLOY_FAILED:
        return f"{name} cannot be served: {application.message}"
    if status is not None and status.state is ModelState.FAILED:
        return f"{name} cannot be served: {status.error}"
    if application.status != ApplicationStatus.RUNNING:
        return None
    if status is None:
        return f"{name} is ready"
    return f"{name} is ready on {status.target} ({status.device})" if status.state is ModelState.READY else None


def _check_name(name: str) -> None:
    check_name(name)
    if SEPARATOR in name:
        raise InvalidInput(
            "name", f"'{name}' has a {SEPARATOR}, which Ray does not allow: give another, as in NAME=DIR"
        )


def _path(thing: Any) -> str:
    """Where other processes import it from."""
    return f"{thing.__module__}.{thing.__qualname__}"


def _free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind((LOOPBACK, 0))
        return int(taken.getsockname()[1])


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that is set by the first SIGINT or SIGTERM. The next one ends the process at once.

    Ray's own handler of SIGTERM, which it sets when it starts, aborts the process.
    """
    stop = threading.Event()

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    yield stop
