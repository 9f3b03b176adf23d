"""What each layer's quantization does to a submodel too big to try every form of every layer, from a few runs.

Errors of layers are added all at once, each by a random sign and so little that the output answers linearly. Noises of
different layers are nearly orthogonal at the output, so the covariance of what such probes do to it is S diag(g) S'
with the known signs S, and n probes tell about n^2 / 2 noises g apart: sources are located with fewer sensors in the
same way. g is found as in covariance fitting and sparse Bayesian learning, by the multiplicative update of Gerstoft et
al. 2016 (IEEE SPL 23, "Multisnapshot sparse Bayesian learning for DOA"), stopped early. After each round the shares are
chosen anew so that every error is about as large as the others: a weak one beside a strong one is lost in its noise. No
gradient is needed, and nothing is held but scales and a sample of each probe's output.

A probe adds the error of each layer's coarsest weight and that of its int8 input. Errors of its finer weights have the
same gain, so their noise follows from the ratio of the errors themselves, on a few columns, weighted by the mean square
of the channels they meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.ground.progress import reached
from calibration.quantize.equalize import columns
from calibration.quantize.forms import restored
from calibration.quantize.layers import Layer, name_of, weight_layers
from calibration.quantize.plan import LayerPlan
from calibration.quantize.tuning import Tuning
from calibration.search.sensitivity import Alternative, Board, Errors, Kept, WeightKind, kind_of, measured

Numbers = NDArray[np.float64]

ROUNDS: Final = 8
"""Rounds of probes; after each the shares are chosen anew."""
LEAST: Final = 24
"""Probes at least."""
SOURCES_PER_PROBE: Final = 3
LOUDNESS: Final = 1e-9
"""Noise of a whole probe, as a share of the output's power."""
LOCAL: Final = 1e-7
"""Noise that a probe makes of any one operand at most, as a share of its power: what layers answer linearly."""
UPDATES: Final = 50
"""Of the fit. More would drive faint noises to zero."""
FAINTEST: Final = 0.03
"""The least noise of a source, as a share of the mean noise in the probes: one that is not measurable still costs
something in a search."""


@dataclass(frozen=True)
class Source:
    """An error that a layer may add: that of its weight in its coarsest `kind`, or with none that of its input.

    `power` is the error's, as a share of that of what it is an error of.
    """

    layer: int
    kind: WeightKind | None
    power: float


def runs(board: Board, sources: Sequence[Source]) -> int:
    """How many probes tell so many sources apart: see decision 10."""
    return max(LEAST, ceil(len(sources) / SOURCES_PER_PROBE))


def approximate(model: ir.Model, board: Board, tuning: Tuning, kept: Kept = measured) -> list[list[Alternative]]:
    """As `Board.alternatives`, with noises estimated in `runs` runs. `model` is the graph that the board
    was made of.
    """
    powers = [
        _powers(layer, [plans[name_of(layer.node)] for plans in board.forms], tuning) for layer in weight_layers(model)
    ]
    sources = _sources(model, board, tuning, powers)
    noises = dict(zip([(one.layer, one.kind is None) for one in sources], _noises(board, sources, kept), strict=True))

    def noise(layer: int, planned: LayerPlan) -> float:
        found = powers[layer]
        weights = noises[layer, False] * found[kind_of(planned)] / max(found.values())
        return weights + (noises[layer, True] if planned.activation else 0.0)

    return [[Alternative(form, noise(layer, form)) for _, form in forms] for layer, forms in enumerate(board.choices())]


def _powers(layer: Layer, forms: Sequence[LayerPlan], tuning: Tuning) -> dict[WeightKind, float]:
    """Power of the error of each kind of weight as a share of the weight's, as its inputs see it where they
    are known.
    """
    importance = tuning.importance.get(name_of(layer.node.inputs[0]))
    planned = {kind_of(form): form for form in forms if form.weight_type != "float"}
    if not planned:
        return {}
    weights = columns(layer)
    seen = (
        np.ones((len(weights), 1), np.float32)
        if importance is None or len(importance) != len(weights)
        else importance[:, None]
    )
    whole = float((seen * np.square(weights)).sum(dtype=np.float64)) or 1.0
    return {
        kind: max(
            float((seen * np.square(restored(weights, form, importance) - weights)).sum(dtype=np.float64)) / whole,
            1e-30,
        )
        for kind, form in planned.items()
    }


def _sources(
    model: ir.Model, board: Board, tuning: Tuning, powers: Sequence[Mapping[WeightKind, float]]
) -> list[Source]:
    found = []
    for index, (layer, kinds) in enumerate(zip(weight_layers(model), powers, strict=True)):
        if kinds:
            coarsest = max(kinds, key=lambda kind: kinds[kind])
            found.append(Source(index, coarsest, kinds[coarsest]))
        if any(plans[board.layers[index]].activation for plans in board.forms):
            seen = tuning.ranges[name_of(layer.node.inputs[0])]
            found.append(Source(index, None, max(10 ** (-seen.snr_db / 10), 1e-30)))
    return found


def _noises(board: Board, sources: Sequence[Source], kept: Kept) -> Numbers:
    """Noise of each source alone, at its full strength."""
    if not sources:
        return np.zeros(0)
    generator, most = np.random.default_rng(0), np.array([sqrt(LOCAL / source.power) for source in sources])
    shares = most / 10
    total = runs(board, sources)
    probes, changes = np.zeros((0, len(sources))), []
    for end in (total * number // ROUNDS for number in range(1, ROUNDS + 1)):
        for number in range(len(probes), end):
            reached(number / total, f"probe {number + 1} of {total}")
            probe = generator.choice([-1.0, 1.0], len(sources)) * shares
            probes = np.vstack([probes, probe])
            changes.append(kept(f"probe-{number}", partial(board.change, _errors(board, sources, probe))))
        stacked = np.stack(changes)
        noises = fitted(stacked @ stacked.T, probes)
        shares = np.minimum(np.sqrt(LOUDNESS / len(sources) / noises), most)
    return fitted(stacked @ stacked.T, probes, FAINTEST)


def _errors(board: Board, sources: Sequence[Source], shares: Numbers) -> Errors:
    errors = board.none()
    for source, share in zip(sources, shares, strict=True):
        if source.kind is None:
            errors.activations[source.layer] = share
        else:
            errors.weights[source.layer, board.kinds.index(source.kind)] = share
    return errors


def fitted(covariance: Numbers, probes: Numbers, least: float = 1e-9) -> Numbers:
    """The noises [n] of sources whose sum, each by its share in `probes` [p, n], best explains the covariance [p, p] of
    what they did.
    """
    scale = np.sqrt(np.mean(probes**2, axis=0))
    signs, loudness = probes / scale, float(np.trace(covariance)) / len(probes) or 1e-30
    mean = loudness / probes.shape[1]
    noises, rest = np.full(probes.shape[1], mean), 1e-3 * loudness
    for _ in range(UPDATES):
        inverse = np.linalg.inv((signs * noises) @ signs.T + rest * np.eye(len(probes)))
        explained = inverse @ signs
        seen = np.einsum("pn,pq,qn->n", explained, covariance, explained)
        expected = np.einsum("pn,pn->n", signs, explained)
        noises = np.maximum(noises * np.sqrt(seen / expected), least * mean)
        rest = max(rest * float(np.sqrt(np.trace(inverse @ covariance @ inverse) / np.trace(inverse))), 1e-9 * loudness)
    return noises / scale**2
