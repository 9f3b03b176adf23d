"""What the parts of a bundle weigh: weights lie there once, however many targets read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.bundle import MANIFEST, Bundle
from runtime.engine import target, targets
from runtime.errors import BundleError


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle: canonical graphs and weights, what each target stores, everything else.

    `apart` is what bundles of one target each would be together, whose graphs and weights each would have if it reads them.
    """

    graphs: int
    targets: Mapping[str, int]
    rest: int
    apart: int

    @property
    def total(self) -> int:
        return self.graphs + sum(self.targets.values()) + self.rest


def sizes(bundle: Bundle) -> Sizes:
    """Bytes of the files of a bundle. Raises BundleError where one is missing."""
    manifest = bundle.manifest
    try:
        found = {path: (bundle.root / path).stat().st_size for path in (*manifest.files, MANIFEST)}
    except OSError as error:
        raise BundleError(f"bundle {bundle.root} is damaged: {error.filename} cannot be read ({error.strerror}). Copy it again") from None
    canonical = {path for submodel in manifest.submodels for path in bundle.graph_files(submodel)}
    graphs = sum(found[path] for path in canonical)
    own = {name: sum(size for path, size in found.items() if path.startswith(f"engines/{name}/")) for name in bundle.targets}
    rest = sum(found.values()) - graphs - sum(own.values())
    reading = {one.target for one in manifest.artifacts if one.target not in targets() or target(one.target).reads_graph(one)}
    apart = sum(size + rest + (graphs if name in reading else 0) for name, size in own.items())
    return Sizes(graphs, own, rest, apart)
