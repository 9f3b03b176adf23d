"""Requests made from /openapi.json, valid and invalid ones, to every endpoint of every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, status_code_conformance

from tests.fakes.embedding import EmbeddingServer
from tests.fakes.web import serve

MODELS = {"image": "draw", "embed": "match"}
"""The model for endpoints with this in their paths; of others it is "talk"."""


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with EmbeddingServer(tmp_path_factory.mktemp("fake") / "bundles", ready=True) as fake:
        web = serve(fake)
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{web.port}/openapi.json")
        fake.do(web.stop())


def checked(case: Any) -> None:
    """Send a request, if it names a model one that is there, and check the response."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = next((MODELS[part] for part in MODELS if part in case.path), "talk")
    response = case.call()
    assert response.status_code < 500 or response.status_code == 503, response.text
    case.validate_response(response, checks=[negative_data_rejection, status_code_conformance])


def attack(schema: Any, examples: int) -> None:
    """Send so many requests of each kind to every endpoint."""
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    how = settings(
        max_examples=examples,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.POSITIVE or operation.body:
                how(given(operation.as_strategy(generation_mode=mode))(checked))()


def test_every_endpoint(schema: Any) -> None:
    attack(schema, 2)


@pytest.mark.full
def test_every_endpoint_at_length(schema: Any) -> None:
    attack(schema, 300)
