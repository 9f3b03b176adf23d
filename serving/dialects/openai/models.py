"""GET /v1/models and /v1/models/{model} (https://platform.openai.com/docs/api-reference/models)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from serving.dialects.openai.shared import now
from serving.host.models import ModelHost


def add(routes: APIRouter, host: ModelHost) -> None:
    """Add the endpoints for a host."""
    created = now()

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "enginecast"}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model(status.name) for status in host.statuses()]}

    @routes.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        return model(host.status(name).name)
