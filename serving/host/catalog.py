"""The models of a server by name."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from serving.host.offers import check_name
from serving.host.served import Served


class Catalog:
    """The models of a server. Iterating yields them sorted by name."""

    def __init__(self) -> None:
        self._models: dict[str, Served] = {}

    def __iter__(self) -> Iterator[Served]:
        return iter([self._models[name] for name in sorted(self._models)])

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def add(self, served: Served) -> None:
        """Add a model. Raises InvalidInput if its name is invalid or used."""
        offer = served.offer
        check_name(offer.name)
        if offer.name in self._models:
            other = self._models[offer.name].offer.root
            raise InvalidInput(
                "bundle",
                f"{offer.root} and {other} are both called '{offer.name}': give one another name, as in "
                f"`enginecast serve {offer.name}={other} {offer.name}-2={offer.root}`",
            )
        self._models[offer.name] = served

    def replace(self, served: Served, by: Served) -> bool:
        """Serve another bundle by the name of a model. Returns False if the model was removed."""
        if self._models.get(served.name) is not served:
            return False
        self._models[served.name] = by
        return True

    def find(self, name: str) -> Served:
        """The model that a request names. Raises InvalidInput without a name, NotFound with the nearest name."""
        if not name:
            raise InvalidInput("model", f"is missing: name one of {', '.join(sorted(self._models))}")
        if name not in self._models:
            raise NotFound(f"model {quoted(name)} is not served here: {did_you_mean(name, self._models)}")
        return self._models[name]
