"""A folder of bundles of one model with other numbers each, such as int8 and int4, and which of them is loaded here.

    FOLDER/int8/manifest.json
    FOLDER/int4/manifest.json

By measured figures the fastest on this machine is chosen, of those that are nearly as fast the most exact one. Without
figures of two of them it is the most exact one, which has the most bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.engine import targets
from runtime.errors import InvalidInput
from runtime.placing import measured
from runtime.placing.choices import Decision
from runtime.placing.devices import detect
from runtime.placing.nearest import near_rows, profiles
from runtime.placing.placement import PlacementOptions

NEARLY: Final = 1.05
"""A more exact bundle may take this much longer than the fastest."""


@dataclass(frozen=True)
class Chosen:
    """The bundle to load, and why it is that one where there are several."""

    bundle: Bundle
    decision: Decision | None = None


def variants(root: Path) -> list[Path]:
    """The folders of the bundles in a folder, by name; none if it is a bundle itself, or holds fewer than two. Folders
    that are called by a number are versions (`serving.host.repository`).
    """
    if not root.is_dir() or (root / MANIFEST).exists():
        return []
    try:
        folders = sorted(root.iterdir())
    except OSError:  # it was just removed, or may not be read: opening it says so
        return []
    found = [
        folder
        for folder in folders
        if folder.name[0] != "." and not folder.name.isdecimal() and (folder / MANIFEST).is_file()
    ]
    return found if len(found) > 1 else []


def chosen(root: Path, wanted: str | None = None, placing: PlacementOptions | None = None) -> Chosen:
    """The bundle in this folder, or the one of several there to load on the `wanted` target, or on any.

    Raises the errors of `Bundle`, also if the bundles do not differ in their numbers, and InvalidInput if they are of
    several models.
    """
    folders = variants(root)
    if not folders:
        return Chosen(Bundle(root))
    found = [Bundle(folder) for folder in folders]
    if len({(one.manifest.source.fingerprint, one.manifest.pipeline) for one in found}) > 1:
        names = ", ".join(f"{one.root.name} of {one.manifest.source.name}" for one in found)
        raise InvalidInput("bundle", f"{root} holds bundles of several models ({names}): name one of them")
    exact = sorted(found, key=lambda one: -sum(submodel.nbytes for submodel in one.manifest.submodels))
    by_quant: dict[str, Bundle] = {}
    for one in exact:
        by_quant.setdefault(one.manifest.quant, one)
    if len(by_quant) < 2:
        return Chosen(Bundle(root))  # says that it is none: which one is meant is not known
    return _fastest(by_quant, wanted, placing or PlacementOptions()) or Chosen(exact[0], _most_exact(exact))


def _fastest(by_quant: Mapping[str, Bundle], wanted: str | None, placing: PlacementOptions) -> Chosen | None:
    """The one that figures choose, of bundles by the label of their numbers, the most exact first."""
    usable = {quant: _usable(bundle, wanted) for quant, bundle in by_quant.items()}
    manifests = [bundle.manifest for bundle in by_quant.values()]
    for profile in profiles(manifests, near_rows(manifests, detect(), measured.collected(placing.rows).rows)):
        seconds = profile.only(lambda one: one.target in usable.get(one.quant, ())).fastest(lambda one: one.quant)
        if len(seconds) < 2:
            continue
        least = next(iter(seconds.values()))
        best = next(quant for quant in by_quant if quant in seconds and seconds[quant] <= NEARLY * least)
        others = [quant for quant in seconds if quant != best]
        against = ", ".join(f"{seconds[quant]:.3g}" for quant in others)
        reason = f"{best} before {', '.join(map(str, others))}: measured {seconds[best]:.3g} against {against} s"
        return Chosen(by_quant[best], Decision(by_quant[best].name, f"{reason} {profile.source}"))
    return None


def _usable(bundle: Bundle, wanted: str | None) -> set[str]:
    """The targets of a bundle that run here."""
    return {
        name
        for name in bundle.targets
        if wanted in (None, name) and name in targets() and targets()[name].available().usable
    }


def _most_exact(exact: Sequence[Bundle]) -> Decision:
    others = ", ".join(one.root.name for one in exact[1:])
    why = "the figures of two of them on a processor like this one are missing, `enginecast tune` measures them"
    return Decision(exact[0].name, f"the most exact bundle, beside {others}: {why}")
