"""What `enginecast serve` does with its settings."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from runtime.bundle import signing
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.placing.loading import load_model
from serving.cli.options import caching, engine_options, named, placement
from serving.dialects.grpc import server
from serving.host.job import Model
from serving.host.lifecycle import Loader
from serving.host.models import ModelHost
from serving.host.offers import Limits, Offer
from serving.security.protection import Security
from serving.security.tls import TlsFiles
from serving.settings import Settings


def start(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    load, offered, protection = loader(settings), offers(settings), security(settings)

    async def run() -> None:
        host = ModelHost(offered, load, Limits(max_queue=settings.max_queue, grace_seconds=settings.grace))
        await server.serve(host, settings.address, lambda line: print(line, flush=True), protection)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run())


def offers(settings: Settings) -> list[Offer]:
    """The bundles to serve. Raises the first error if none can be opened."""
    if not settings.bundles:
        raise InvalidInput("bundles", "are missing: name the folders to serve, as in `enginecast serve bundles/mine`")
    found = [Offer.of(root, name) for name, root in map(named, settings.bundles)]
    if all(offer.error for offer in found):
        raise next(offer.error for offer in found if offer.error)
    return found


def loader(settings: Settings) -> Loader:
    """Loads bundles as the settings say."""
    options = engine_options(settings.device, settings.threads)
    placing = placement(settings.place, settings.memory_limit, settings.strict)
    placing = caching(placing, settings.picture_cache)
    key = settings.require_signature
    if key is not None:
        signing.public_key(key)  # a wrong key fails at once

    def load(bundle: Bundle | Path, requested: str | None) -> Model:
        return load_model(bundle, requested or settings.target, options, placing, key)

    return load


def security(settings: Settings) -> Security:
    """How the server is protected."""
    tls = TlsFiles.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return Security(tls, settings.insecure)
