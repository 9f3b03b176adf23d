"""Which models there are: /api/tags, /api/ps, /api/show."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Final

from runtime.bundle.manifest import MANIFEST
from runtime.errors import InvalidInput
from runtime.tasks.chat import ChatRequest
from runtime.tasks.embed import EmbedRequest
from runtime.tasks.image import ImageRequest
from serving.dialects.ollama import names
from serving.dialects.ollama.fields import Name
from serving.dialects.ollama.replies import Fields
from serving.host.models import ModelHost
from serving.host.offers import Offer
from serving.host.residency import HOST
from serving.host.states import ModelState, Status

FORMAT: Final = "enginecast"
COMPLETION, EMBEDDING, IMAGE, VISION = "completion", "embedding", "image", "vision"
ABILITIES: Final = {ChatRequest.task: COMPLETION, EmbedRequest.task: EMBEDDING, ImageRequest.task: IMAGE}
"""Ollama's names of what models do."""
NEVER: Final = "9999-12-31T23:59:59Z"
"""When a model expires that stays loaded, or that is in use."""


def named(body: Name) -> str:
    """The model that a request names, as `model` or, of old clients, as `name`. Raises InvalidInput."""
    name: str | None = body.model or body.name
    if not name:
        raise InvalidInput("model", "is missing, and is required")
    return name


def tags(host: ModelHost) -> Fields:
    """Every model, by every name that it has."""
    return {
        "models": [
            {**_facts(offer, name), "size": _size(offer), "modified_at": _modified(offer)}
            for status in host.statuses()
            for offer in [_offer(host, status)]
            for name in names.shown(offer, status.is_default)
        ]
    }


def ps(host: ModelHost) -> Fields:
    """The loaded models."""
    loaded = [status for status in host.statuses() if status.state is ModelState.READY]
    return {
        "models": [
            {
                **_facts(offer, names.tagged(offer)),
                "size": sum(status.memory.values()),
                "size_vram": sum(size for device, size in status.memory.items() if device != HOST),
                "expires_at": _expires(status),
            }
            for status in loaded
            for offer in [_offer(host, status)]
        ]
    }


def show(host: ModelHost, body: Name) -> Fields:
    """What is known of a model."""
    status = host.status(names.known(host, named(body)))
    offer = _offer(host, status)
    return {
        "details": _details(offer),
        "model_info": _info(offer),
        "capabilities": _capabilities(offer),
        "parameters": _parameters(offer),
        "modified_at": _modified(offer),
    }


def _offer(host: ModelHost, status: Status) -> Offer:
    return host.catalog.find(status.name).offer


def _size(offer: Offer) -> int:
    """Bytes of the weights."""
    return sum(submodel.nbytes for submodel in offer.bundle.manifest.submodels) if offer.bundle else 0


def _facts(offer: Offer, name: str) -> Fields:
    content = offer.bundle.content if offer.bundle else b""
    return {"name": name, "model": name, "digest": hashlib.sha256(content).hexdigest(), "details": _details(offer)}


def _details(offer: Offer) -> Fields:
    family = offer.bundle.manifest.source.family if offer.bundle else ""
    return {
        "parent_model": "",
        "format": FORMAT,
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "",
        "quantization_level": offer.quant,
    }


def _info(offer: Offer) -> Fields:
    """Facts of the manifest."""
    if offer.bundle is None:
        return {}
    manifest = offer.bundle.manifest
    context = manifest.config.get("context_length")
    return {
        "general.architecture": manifest.source.architecture,
        "general.name": manifest.name,
        "general.task": manifest.task,
        "general.pipeline": manifest.pipeline,
        "general.targets": list(offer.bundle.targets),
        **({} if context is None else {f"{manifest.source.architecture}.context_length": context}),
        **{f"{submodel.name}.bytes": submodel.nbytes for submodel in manifest.submodels},
    }


def _capabilities(offer: Offer) -> list[str]:
    if offer.bundle is None:
        return []
    sees = any("vision" in submodel.name for submodel in offer.bundle.manifest.submodels)
    own = [ABILITIES[offer.task]] if offer.task in ABILITIES else []
    return [*own, VISION] if sees else own


def _parameters(offer: Offer) -> str:
    """The defaults of requests, a line each."""
    defaults = offer.bundle.manifest.config.get("defaults", {}) if offer.bundle else {}
    shown = {name: value for name, value in defaults.items() if isinstance(value, int | float | str)}
    return "\n".join(f"{name:<30} {value}" for name, value in shown.items())


def _modified(offer: Offer) -> str:
    try:
        changed = (offer.root / MANIFEST).stat().st_mtime
    except OSError:  # the bundle was removed a moment ago
        changed = 0.0
    return datetime.fromtimestamp(changed, UTC).isoformat().replace("+00:00", "Z")


def _expires(status: Status) -> str:
    if status.unload_seconds is None:
        return NEVER
    return (datetime.now(UTC) + timedelta(seconds=status.unload_seconds)).isoformat().replace("+00:00", "Z")
