"""deploy/envoy lets clients reach the services of a cluster, and nothing else of Ray's ingress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_reflection.v1alpha import reflection

from serving.cli.options import ADDRESS
from serving.dialects.grpc.health import MODEL
from serving.dialects.grpc.task import grpc_tasks

CONFIG = yaml.safe_load((Path(__file__).parents[3] / "deploy" / "envoy" / "envoy.yaml").read_text())["static_resources"]
FILTER = CONFIG["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
ROUTES: list[Any] = FILTER["route_config"]["virtual_hosts"][0]["routes"]


def reached(service: str) -> bool:
    return any(f"/{service}/Method".startswith(route["match"]["prefix"]) for route in ROUTES)


@pytest.mark.parametrize(
    "service",
    [
        *(task.service.full_name for task in grpc_tasks().values()),
        MODEL,
        "grpc.health.v1.Health",
        reflection.SERVICE_NAME,
    ],
)
def test_services_are_reached(service: str) -> None:
    assert reached(service)


def test_rays_own_service_is_not_reached() -> None:
    assert not reached("ray.serve.RayServeAPIService")


def test_calls_may_take_as_long_as_clients_allow() -> None:
    assert FILTER["stream_idle_timeout"] == "0s"
    assert all(route["route"]["timeout"] == "0s" for route in ROUTES)


def test_it_leads_to_the_usual_port() -> None:
    endpoint = CONFIG["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    address = endpoint["address"]["socket_address"]
    assert f"{address['address']}:{address['port_value']}" == ADDRESS
