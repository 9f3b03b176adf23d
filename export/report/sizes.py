"""The sizes of a bundle's parts. Weights are stored once, however many targets read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.bundle.manifest import MANIFEST, Bundle, Submodel
from runtime.engine import target, targets
from runtime.errors import BundleError


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle: canonical graphs and weights, what each target stores, everything else.

    `apart` is the size of as many bundles of one target each, in which every target that reads the graphs and weights
    has its own.
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
        raise BundleError(
            f"bundle {bundle.root} is damaged: {error.filename} cannot be read ({error.strerror}). Copy it again"
        ) from None
    canonical = {path for submodel in manifest.submodels for path in bundle.graph_files(submodel)}
    graphs = sum(found[path] for path in canonical)
    own = {
        name: sum(size for path, size in found.items() if path.startswith(f"engines/{name}/"))
        for name in bundle.targets
    }
    rest = sum(found.values()) - graphs - sum(own.values())
    reading = {
        one.target for one in manifest.artifacts if one.target not in targets() or target(one.target).reads_graph(one)
    }
    apart = sum(size + rest + (graphs if name in reading else 0) for name, size in own.items())
    return Sizes(graphs, own, rest, apart)


def megabytes(nbytes: int) -> str:
    """Bytes in MB with three digits or all before the point."""
    return f"{nbytes / 1e6:.{0 if nbytes >= 1e8 else 1 if nbytes >= 1e7 else 3}f} MB"


def forms(submodels: Sequence[Submodel], quant: str) -> str:
    """The formats that the weights of these submodels are stored in, by share of all numbers, and why some are not in
    that of `quant`; empty where unknown.
    """
    counts, nbytes, reasons = Counter[str](), Counter[str](), Counter[str]()
    for weights in (one for submodel in submodels for one in submodel.weights):
        counts[weights.form] += weights.elements
        nbytes[weights.form] += weights.nbytes
        if weights.reason:
            reasons[weights.reason] += weights.elements
    total = sum(counts.values())
    if not total:
        return ""
    shares = ", ".join(
        f"{form} {100 * count / total:.1f} % ({megabytes(nbytes[form])})" for form, count in counts.most_common()
    )
    why = "; ".join(f"{100 * count / total:.1f} % {reason}" for reason, count in reasons.most_common())
    return shares + (f". Not {quant}: {why}" if why else "")
