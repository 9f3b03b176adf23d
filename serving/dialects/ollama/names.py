"""Names of models as clients of Ollama write them: NAME:TAG. The tag is the version, and "latest" the default one."""

from __future__ import annotations

from typing import Final

from runtime.errors import InvalidInput
from serving.host.models import ModelHost
from serving.host.offers import VERSION_MARK, Offer
from serving.host.repository import VERSION

LATEST: Final = "latest"
MARK: Final = ":"


def known(host: ModelHost, name: str) -> str:
    """The name by which a model is served that a client calls `name`, or the one that it would have."""
    return name if name in host.catalog else served(name)


def served(name: str) -> str:
    """NAME of NAME:latest, NAME@VERSION of NAME:VERSION."""
    model, mark, tag = name.rpartition(MARK)
    if not mark:
        return name
    return model if tag == LATEST else f"{model}{VERSION_MARK}{tag}"


def storable(name: str) -> tuple[str, str]:
    """The model and the version that a client's name has in a repository; the version is empty for "latest". Raises
    InvalidInput.
    """
    model, _, version = served(name).partition(VERSION_MARK)
    if version and not VERSION.fullmatch(version):
        raise InvalidInput("model", f"has the tag '{version[:20]}', expected a version from 1 on, such as shapes:2")
    return model, version


def tagged(offer: Offer) -> str:
    """The name of a bundle with its tag."""
    return f"{offer.model}{MARK}{offer.version or LATEST}"


def shown(offer: Offer, is_default: bool) -> list[str]:
    """Every name by which clients may call a model, with its tag: the default version has two."""
    latest = f"{offer.model}{MARK}{LATEST}"
    return [tagged(offer), latest] if offer.version and is_default else [tagged(offer)]
