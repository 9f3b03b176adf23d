"""Which settings of a server a cluster has, and what it makes of them."""

from __future__ import annotations

from typing import Final

from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from serving.security.addresses import is_loopback, split
from serving.settings import Settings

NO_TLS: Final = "Ray's ingress has no TLS: a proxy in front of it adds it, see deploy/envoy"
NO_TOKENS: Final = "Ray's ingress has no TLS and would receive tokens unencrypted: a proxy in front of it checks them"
OWN: Final = "a cluster has Ray's own metrics and traces, see docs/serving/cluster.md"
REFUSED: Final = {
    "tls_cert": NO_TLS,
    "tls_key": NO_TLS,
    "tls_client_ca": NO_TLS,
    "tokens": NO_TOKENS,
    "audit_log": "the models of a cluster are not managed by clients, so there is nothing to write into it",
    "http": "Ray's ingress speaks gRPC only: a proxy in front of it translates gRPC-Web",
    "http_origins": "belongs to --http, which a cluster does not have",
    "http_hosts": "belongs to --http, which a cluster does not have",
    "page": "belongs to --http, which a cluster does not have",
    "library": "belongs to --http, which a cluster does not have",
    "checkpoints": "belongs to --http, which a cluster does not have",
    "fetch_hosts": "belongs to --http, which a cluster does not have",
    "metrics": OWN,
    "traces": OWN,
}
"""Settings that a cluster does not have, and why."""
CLUSTER: Final = ("ray_address", "min_replicas", "max_replicas", "scale_down", "replica_cpus", "replica_gpus")
"""Settings that only a cluster has."""


def check(settings: Settings) -> None:
    """Raise InvalidInput for settings that a cluster does not have, or that contradict each other."""
    usual = Settings()
    for name in REFUSED:
        if getattr(settings, name) != getattr(usual, name):
            raise InvalidInput(name, f"has no effect with --engine ray: {REFUSED[name]}")
    if settings.max_queue < 1:
        raise InvalidInput("max_queue", "is 0, expected at least 1 with --engine ray: requests wait while it scales up")
    split(settings.address)
    if not (is_loopback(settings.address) or settings.insecure):
        raise InvalidInput(
            "address",
            f"{settings.address} can be reached from other machines, and Ray's ingress has no TLS: listen on 127.0.0.1 "
            "behind a proxy, or allow it with --insecure",
        )
    if settings.max_replicas < max(1, settings.min_replicas):
        raise InvalidInput(
            "max_replicas", f"is {settings.max_replicas}, less than --min-replicas {settings.min_replicas}"
        )


def alone(settings: Settings) -> None:
    """Raise InvalidInput for settings that only a cluster has."""
    usual = Settings()
    for name in CLUSTER:
        if getattr(settings, name) != getattr(usual, name):
            raise InvalidInput(name, "belongs to --engine ray: give both")


def at_once(task: str | None, settings: Settings) -> int:
    """Requests that a replica takes at once: one picture, several of what runs together."""
    return 1 if task == ImageRequest.task else settings.parallel
