"""What clients of OpenAI use: paths under /v1 (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter

from serving.dialects.http.dialect import Dialect
from serving.dialects.http.fetching import Hosts
from serving.dialects.http.route import Route
from serving.dialects.openai import chat, embeddings, images, models
from serving.dialects.openai.errors import body
from serving.host.models import ModelHost
from serving.settings import Settings


def router(host: ModelHost, settings: Settings) -> APIRouter:
    """The endpoints for a host. Raises InvalidInput for hosts to fetch from that are malformed."""
    routes = APIRouter(route_class=Route)
    models.add(routes, host)
    hosts = Hosts(settings.fetch_hosts or ())
    chat.add(routes, host, hosts)
    embeddings.add(routes, host, hosts)
    images.add(routes, host)
    return routes


DIALECT: Final = Dialect("openai", ("/v1/",), router, body)
