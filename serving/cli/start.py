"""What `enginecast serve` does with its settings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Final

from runtime.errors import InvalidInput, did_you_mean
from runtime.optional import require
from runtime.placing.measured import default_files
from serving.cli.offered import host_of
from serving.cluster import options
from serving.dialects.grpc import server
from serving.host.models import ModelHost
from serving.host.observing import Observer
from serving.observers import logs
from serving.observers.logs import RequestLog
from serving.observers.metrics import Metrics
from serving.observers.traces import Traces, otlp
from serving.security.addresses import with_port
from serving.security.audit import Audit
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.tls import TlsFiles
from serving.settings import Settings

if TYPE_CHECKING:
    from serving.page.application import Application

ENGINES: Final = ("local", "ray")
HTTP_PORT: Final = 11434
"""The port that clients of Ollama expect."""
HTTP_ALONE: Final = ("http_origins", "http_hosts", "page", "fetch_hosts", "library", "checkpoints")
"""Settings of the HTTP server alone."""


def start(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    logs.configure(settings.log_format)
    if settings.engine not in ENGINES:
        raise InvalidInput("engine", f"'{settings.engine}' is not known: {did_you_mean(settings.engine, ENGINES)}")
    if settings.engine == "ray":
        require("ray.serve", "ray")
        from serving.cluster.deploying import start as deploy

        deploy(settings, announce)
    else:
        serve(settings)


def serve(settings: Settings) -> None:
    """Serve from this process."""
    options.alone(settings)
    make, protection = host_of(settings), security(settings)

    async def run() -> None:
        with observers(settings, protection) as watching:
            host = make(watching)
            await server.serve(host, settings.address, announce, protection, others(host, settings, protection))

    asyncio.run(run())


def announce(line: str) -> None:
    """Say on standard output what the server does."""
    print(line, flush=True)


@contextmanager
def observers(settings: Settings, protection: Security) -> Iterator[list[Observer]]:
    """What observes the server as the settings say, until the block ends."""
    with ExitStack() as stack:
        watching: list[Observer] = [RequestLog()]
        if settings.audit_log is not None:
            watching.append(Audit(settings.audit_log))
        if settings.metrics is not None:
            metrics = Metrics()
            port = stack.enter_context(metrics.served(settings.metrics, protection))
            announce(f"metrics on {settings.metrics.rpartition(':')[0]}:{port}")
            watching.append(metrics)
        if settings.traces is not None:
            watching.append(stack.enter_context(closing(Traces(otlp(settings.traces)))))
        yield watching


def security(settings: Settings) -> Security:
    """How the server is protected."""
    tls = TlsFiles.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return Security(tls, settings.insecure, Gate(settings.tokens))


def others(host: ModelHost, settings: Settings, protection: Security) -> list[server.Beside]:
    """The servers beside that of gRPC."""
    if settings.http is None:
        for name in (name for name in HTTP_ALONE if getattr(settings, name)):
            raise InvalidInput(name, "is of no effect without --http: give both")
        return []
    for module in ("fastapi", "connectrpc", "uvicorn"):
        require(module, "http")
    from serving.dialects.http.application import application
    from serving.dialects.http.server import HttpServer

    app = application(host, settings, protection.gate)
    origins, hosts, address = (
        settings.http_origins or (),
        settings.http_hosts or (),
        with_port(settings.http, HTTP_PORT),
    )
    if not settings.page:
        return [HttpServer(app, address, origins, hosts, protection)]
    page = page_of(host, protection)
    found = HttpServer(page.before(app), address, origins, hosts, protection, page.leave)
    announce(f"the page is at {found.url}/ui/")
    return [found]


def page_of(host: ModelHost, protection: Security) -> Application:
    """The web page of a host."""
    require("gradio", "ui")
    from serving.page.application import Application
    from serving.page.backend import Local

    return Application(Local(host, protection.gate), default_files(), protection.gate)
