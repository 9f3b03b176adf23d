"""The models of a server by its settings: which there are, how they are loaded, and which stay loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.bundle import signing
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.placing.devices import detect
from runtime.placing.heap import collect
from runtime.placing.loading import begin_model, load_model
from runtime.placing.memory import parse_size
from runtime.placing.placement import PlacementOptions, caches, needs
from runtime.script import Folders
from runtime.scripting import Scripts
from serving.cli.options import caching, engine_options, named, parse_keep_alive, placement
from serving.host.job import Model
from serving.host.loading import Loader
from serving.host.models import ModelHost
from serving.host.observing import Observer
from serving.host.offers import ENDLESS, VERSION_MARK, Limits, Offer
from serving.host.repository import KEEP_ALIVE, VERSION, Repository
from serving.host.residency import Memory, Needs
from serving.host.warming import warmed
from serving.settings import Settings


def host_of(settings: Settings) -> Callable[[Sequence[Observer]], ModelHost]:
    """Makes the host with its observers, on a running event loop. Raises the errors of the settings at once."""
    offered, load, shared, folder = offers(settings), loader(settings), memory(settings), repository(settings)
    versions, scripts = default_versions(settings), Scripts(Folders(settings.wildcards, settings.styles))
    limits = Limits(settings.parallel, settings.max_queue, settings.grace)

    def make(observers: Sequence[Observer]) -> ModelHost:
        host = ModelHost(offered, load, limits, observers=observers, memory=shared, versions=versions, scripts=scripts)
        if folder is not None:
            host.follow(folder)
        return host

    return make


def offers(settings: Settings) -> list[Offer]:
    """The bundles to serve besides the repository's. Raises the first error if none can be opened."""
    if not settings.bundles and settings.repository is None:
        raise InvalidInput(
            "bundles",
            "are missing: name the folders to serve, as in `enginecast serve bundles/mine`, or a --repository of them",
        )
    keep_alive = keep_alive_of(settings)
    found = [Offer.of(root, name, keep_alive) for name, root in map(named, settings.bundles or ())]
    if found and all(offer.error for offer in found):
        raise next(offer.error for offer in found if offer.error)
    return found


def repository(settings: Settings) -> Repository | None:
    """The folder of further bundles. Raises NotFound."""
    if settings.repository is None:
        return None
    keep_alive = keep_alive_of(settings)
    return Repository(settings.repository, KEEP_ALIVE if keep_alive is None else keep_alive)


def default_versions(settings: Settings) -> dict[str, str]:
    """The default version of models by name. Raises InvalidInput."""
    found = {}
    for text in settings.default_versions or ():
        name, _, version = text.rpartition(VERSION_MARK)
        if not name or not VERSION.fullmatch(version):
            raise InvalidInput("default_versions", f"has '{text}', expected NAME@VERSION, such as shapes@2")
        found[name] = version
    return found


def keep_alive_of(settings: Settings) -> float | None:
    """Seconds that models stay loaded without requests, None if that is not set. Raises InvalidInput."""
    seconds = parse_keep_alive(settings.keep_alive)
    return ENDLESS if seconds is not None and seconds < 0 else seconds


def memory(settings: Settings) -> Memory:
    """The memory for all models. Raises InvalidInput."""
    options, placing = engine_options(settings.device, settings.threads), placing_of(settings)
    most = None if settings.models_memory is None else parse_size("models_memory", settings.models_memory)

    def estimate(bundle: Bundle, target: str | None) -> Needs:
        where = bundle, target or settings.target, options.device, placing, detect()
        return Needs(needs(*where), caches(*where))

    return Memory(most, estimate, collect)


def placing_of(settings: Settings) -> PlacementOptions:
    """Where submodels run. Raises InvalidInput."""
    placing = placement(settings.place, settings.memory_limit, settings.strict)
    return caching(placing, settings.picture_cache, settings.prefix_cache)


def loader(settings: Settings) -> Loader:
    """Loads bundles as the settings say."""
    options = engine_options(settings.device, settings.threads)
    placing = placing_of(settings)
    key = settings.require_signature
    if key is not None:
        signing.public_key(key)  # a wrong key fails at once

    begun = load_model if settings.warm_up else begin_model

    def load(bundle: Bundle, requested: str | None) -> Model:
        return begun(bundle, requested or settings.target, options, placing, key)

    return warmed(load) if settings.warm_up else load
