"""Fixed lengths of sessions: which shape a call fits, and how a call of another length is split to fit."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from runtime.bundle.signature import Signature
from runtime.errors import EngineError, InvalidInput

Shape = Mapping[str, int]
"""Lengths by the name of their dim. Dims that it does not name may vary."""
NEAR = 0.8
"""How similar a name must be to a dim of the submodel to be treated as a typing error."""


def parse_shapes(text: str) -> tuple[dict[str, int], ...]:
    """Shapes from "height=64,width=64;height=96,width=64". Raises ValueError saying what is wrong."""
    found = []
    for part in text.split(";"):
        shape: dict[str, int] = {}
        for entry in part.split(","):
            name, _, length = (word.strip() for word in entry.partition("="))
            if not name or not length.isdecimal() or not int(length):
                raise ValueError(
                    f"has '{entry.strip()}', expected NAME=LENGTH, such as height=64,width=64;height=96,width=64"
                )
            if shape.setdefault(name, int(length)) != int(length):
                raise ValueError(
                    f"has two lengths for {name} in one shape, expected shapes to be divided by semicolons"
                )
        found.append(shape)
    return tuple(found)


def shapes_of(shapes: Iterable[Shape], signature: Signature) -> tuple[Shape, ...]:
    """The part of each shape that concerns this submodel, without repetitions. Dims of other submodels are ignored.

    Raises InvalidInput for a length that the model does not accept, and for a name that is nearly one of the submodel's
    dims.
    """
    dims, found = signature.dims, []
    for shape in shapes:
        for name, length in shape.items():
            if name not in dims:
                near = difflib.get_close_matches(name, dims, n=1, cutoff=NEAR)
                if near:
                    raise InvalidInput("shapes", f"has '{name}', which is no dim: did you mean '{near[0]}'?")
            elif not dims[name].min <= length <= dims[name].max or length % dims[name].multiple:
                of = f", a multiple of {dims[name].multiple}" if dims[name].multiple > 1 else ""
                raise InvalidInput(
                    "shapes", f"has {name}={length}, and the model takes {dims[name].min} to {dims[name].max}{of}"
                )
        own = {name: length for name, length in shape.items() if name in dims}
        if own and own not in found:
            found.append(own)
    return tuple(found)


def fitting(shapes: Sequence[Shape], lengths: Mapping[str, int]) -> Shape:
    """The shape that these lengths fit, the most specific one where several do. Raises EngineError naming the shapes
    there are.
    """
    fits = [shape for shape in shapes if all(lengths.get(name) == length for name, length in shape.items())]
    if not fits:
        names = sorted({name for shape in shapes for name in shape})
        requested = written({name: lengths[name] for name in names if name in lengths})
        raise EngineError(
            f"{requested} is no shape that it was compiled for, expected {' or '.join(map(written, shapes))}: build it "
            "with more shapes"
        )
    return max(fits, key=len)


def written(shape: Shape) -> str:
    """A shape in the form of a setting."""
    return ",".join(f"{name}={length}" for name, length in sorted(shape.items()))


def cuts(length: int, sizes: Collection[int]) -> list[tuple[int, int]]:
    """The pieces (start, stop) that new positions are split into, in order, each of an available size.

    The last one may begin among positions that are already done; they are computed again with the same result. So the
    fewest pieces are the largest ones, as long as there are that many positions. Raises EngineError when no size fits.
    """
    found: list[tuple[int, int]] = []
    done = 0
    while done < length:
        rest = length - done
        enough = [size for size in sizes if rest <= size <= length]
        below = [size for size in sizes if size <= rest]
        if not enough and not below:
            raise EngineError(
                f"{length} new positions fit none of the lengths it was compiled for: "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
        size = min(enough) if enough else max(below)
        stop = length if enough else done + size
        found.append((stop - size, stop))
        done = stop
    return found
