"""The models of a server by name, and which version of a model is the default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from serving.host.offers import check_name
from serving.host.served import Served


class Catalog:
    """The models of a server. Iterating yields them sorted by name.

    A model with versions has a name for each, such as "shapes@2", and "shapes" names the default one: the one of
    `chosen`, versions by model, else the highest that was promoted.
    """

    def __init__(self, chosen: Mapping[str, str] | None = None) -> None:
        self._chosen = dict(chosen or {})
        self._models: dict[str, Served] = {}
        self._defaults: dict[str, Served] = {}

    def __iter__(self) -> Iterator[Served]:
        return iter([self._models[name] for name in sorted(self._models)])

    def __contains__(self, name: str) -> bool:
        return name in self._models or name in self._defaults

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
        if self.is_default(served):
            self._defaults[served.offer.model] = by
        return True

    def remove(self, served: Served) -> None:
        """Remove a model. If it was the default version, the highest other one is it now."""
        del self._models[served.name]
        if self.is_default(served):
            del self._defaults[served.offer.model]
            others = [one for one in self if one.offer.model == served.offer.model and one.offer.version]
            for one in sorted(others, key=_number, reverse=True):
                self.promote(one)

    def default(self, model: str) -> Served | None:
        """The default version of a model."""
        return self._defaults.get(model)

    def defaults(self) -> dict[str, Served]:
        """The default version of each model that has versions."""
        return dict(self._defaults)

    def is_default(self, served: Served) -> bool:
        return self._defaults.get(served.offer.model) is served

    def may_lead(self, served: Served) -> bool:
        """Whether this version is to be the default one rather than the present one."""
        offer, present = served.offer, self._defaults.get(served.offer.model)
        if offer.model in self._chosen:
            return offer.version == self._chosen[offer.model]
        return bool(offer.version) and (present is None or _number(served) > _number(present))

    def promote(self, served: Served) -> None:
        """Make a version the default one if it may be."""
        if self._models.get(served.name) is served and self.may_lead(served):
            self._defaults[served.offer.model] = served

    def get(self, name: str) -> Served | None:
        """The model that has exactly this name."""
        return self._models.get(name)

    def find(self, name: str) -> Served:
        """The model that a request names. Raises InvalidInput without a name, NotFound with the nearest name."""
        names = sorted({*self._models, *self._defaults})
        if not name:
            raise InvalidInput("model", f"is missing: name one of {', '.join(names)}")
        found = self._models.get(name) or self._defaults.get(name)
        if found is None:
            raise NotFound(f"model {quoted(name)} is not served here: {did_you_mean(name, names)}")
        return found


def _number(served: Served) -> int:
    return int(served.offer.version)
