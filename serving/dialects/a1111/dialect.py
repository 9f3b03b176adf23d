"""What clients of Automatic1111's web UI and of SD.Next use: paths under /sdapi/v1, and /internal/progress as the web
UI's own page (https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter

from runtime.errors import EnginecastError
from serving.dialects.a1111 import clients, extras, generating, listing, reading, watching
from serving.dialects.a1111.generating import Studio
from serving.dialects.a1111.jobs import Jobs
from serving.dialects.http.dialect import Dialect
from serving.dialects.http.errors import message_of
from serving.dialects.http.route import Route
from serving.host.models import ModelHost
from serving.settings import Settings


def router(host: ModelHost, settings: Settings) -> APIRouter:
    """The endpoints for a host."""
    routes = APIRouter(route_class=Route)
    jobs, chosen = Jobs(), clients.Settings()
    generating.add(routes, Studio(host, jobs, chosen))
    watching.add(routes, jobs)
    listing.add(routes, host, chosen)
    reading.add(routes, host)
    extras.add(routes, chosen)
    return routes


def body(error: EnginecastError, status: int) -> Mapping[str, Any]:
    """The JSON of an error."""
    return {"error": type(error).__name__, "detail": message_of(error), "body": "", "errors": ""}


DIALECT: Final = Dialect("a1111", ("/sdapi/", "/internal/", "/controlnet/"), router, body)
