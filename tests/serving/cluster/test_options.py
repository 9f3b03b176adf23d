from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidInput
from serving.cli.start import start
from serving.cluster import options
from serving.settings import Settings, names

CLUSTER = Settings(["a"], engine="ray", address="0.0.0.0:50051", insecure=True)
OTHER: dict[str, Any] = {
    name: Path("x") for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens", "audit_log")
} | {
    "http": "127.0.0.1:0",
    "http_origins": ["x"],
    "http_hosts": ["x"],
    "page": True,
    "library": Path("x"),
    "checkpoints": Path("x"),
    "fetch_hosts": ["x"],
    "metrics": "127.0.0.1:0",
    "traces": "x",
}


def test_settings_that_a_cluster_has_pass() -> None:
    options.check(replace(CLUSTER, address="127.0.0.1:0", insecure=False))
    options.check(replace(CLUSTER, parallel=3, min_replicas=0, max_replicas=2, warm_up=True, prefix_cache="1GiB"))


@pytest.mark.parametrize("name", options.REFUSED)
def test_settings_without_effect_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: has no effect with --engine ray: "):
        options.check(replace(CLUSTER, **{name: OTHER[name]}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"insecure": False}, "address"),
        ({"address": "nowhere"}, "address"),
        ({"max_queue": 0}, "max_queue"),
        ({"min_replicas": 5}, "max_replicas"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        options.check(replace(CLUSTER, **changes))
    assert refused.value.field == field


@pytest.mark.parametrize("name", options.CLUSTER)
def test_settings_of_a_cluster_are_refused_without_one(name: str) -> None:
    value = "auto" if name == "ray_address" else 2
    with pytest.raises(InvalidInput, match=f"^{name}: belongs to --engine ray"):
        start(replace(Settings(["a"]), **{name: value}))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^engine: 'rai' is not known: did you mean 'ray'"):
        start(Settings(["a"], engine="rai"))


def test_every_setting_is_used_or_refused() -> None:
    """A new setting needs a decision: does a replica have it, or is it refused?"""
    of_ingress = {"engine", "address", "insecure", "max_queue", "grace", "parallel", "log_format"}
    of_replicas = {
        *("bundles", "repository", "default_versions", "target", "device", "place", "memory_limit", "strict"),
        *("picture_cache", "prefix_cache", "require_signature", "threads", "keep_alive", "warm_up", "models_memory"),
        *("wildcards", "styles"),
    }
    assert of_ingress | of_replicas | set(options.REFUSED) | set(options.CLUSTER) == set(names())


def test_a_replica_draws_one_picture_at_a_time_and_answers_several_chats() -> None:
    assert options.at_once("image", CLUSTER) == 1
    assert options.at_once("chat", CLUSTER) == CLUSTER.parallel == options.at_once(None, CLUSTER)
