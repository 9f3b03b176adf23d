"""What `enginecast serve` does with its settings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from runtime.bundle import signing
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.placing.devices import detect
from runtime.placing.loading import load_model
from runtime.placing.memory import parse_size
from runtime.placing.placement import PlacementOptions, needs
from serving.cli.options import caching, engine_options, named, parse_keep_alive, placement
from serving.dialects.grpc import server
from serving.host.job import Model
from serving.host.lifecycle import Loader
from serving.host.models import ModelHost
from serving.host.observing import Observer
from serving.host.offers import ENDLESS, Limits, Offer
from serving.host.residency import Memory
from serving.observers import logs
from serving.observers.logs import RequestLog
from serving.observers.metrics import Metrics
from serving.observers.traces import Traces, otlp
from serving.security.audit import Audit
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.tls import TlsFiles
from serving.settings import Settings


def start(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    logs.configure(settings.log_format)
    load, offered, models_memory, protection = loader(settings), offers(settings), memory(settings), security(settings)

    async def run() -> None:
        limits = Limits(max_queue=settings.max_queue, grace_seconds=settings.grace)
        with observers(settings, protection) as watching:
            host = ModelHost(offered, load, limits, memory=models_memory, observers=watching)
            await server.serve(host, settings.address, announce, protection)

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


def offers(settings: Settings) -> list[Offer]:
    """The bundles to serve. Raises the first error if none can be opened."""
    if not settings.bundles:
        raise InvalidInput("bundles", "are missing: name the folders to serve, as in `enginecast serve bundles/mine`")
    keep_alive = parse_keep_alive(settings.keep_alive)
    if keep_alive is not None and keep_alive < 0:
        keep_alive = ENDLESS
    found = [Offer.of(root, name, keep_alive) for name, root in map(named, settings.bundles)]
    if all(offer.error for offer in found):
        raise next(offer.error for offer in found if offer.error)
    return found


def memory(settings: Settings) -> Memory:
    """The memory for all models. Raises InvalidInput."""
    options, placing = engine_options(settings.device, settings.threads), placing_of(settings)
    most = None if settings.models_memory is None else parse_size("models_memory", settings.models_memory)

    def estimate(bundle: Bundle, target: str | None) -> dict[str, int]:
        return needs(bundle, target or settings.target, options.device, placing, detect())

    return Memory(most, estimate)


def placing_of(settings: Settings) -> PlacementOptions:
    """Where submodels run. Raises InvalidInput."""
    return caching(placement(settings.place, settings.memory_limit, settings.strict), settings.picture_cache)


def loader(settings: Settings) -> Loader:
    """Loads bundles as the settings say."""
    options = engine_options(settings.device, settings.threads)
    placing = placing_of(settings)
    key = settings.require_signature
    if key is not None:
        signing.public_key(key)  # a wrong key fails at once

    def load(bundle: Bundle, requested: str | None) -> Model:
        return load_model(bundle, requested or settings.target, options, placing, key)

    return load


def security(settings: Settings) -> Security:
    """How the server is protected."""
    tls = TlsFiles.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return Security(tls, settings.insecure, Gate(settings.tokens))
