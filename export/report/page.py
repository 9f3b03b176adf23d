"""The quality report of a bundle as one page: everything it shows is in the file, and it needs neither network nor
scripts.

Its text is `report.html` and, of each task, the file beside that in `export/tasks/`: jinja2 templates, which escape
everything that comes from the bundle. The page's own policy forbids it to load anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import jinja2
import onnx_ir as ir

from calibration.observe.metrics import CAP_DB
from export.build.staging import check_writable
from export.report.quality import SNR, Quality, floors, load_quality
from export.report.speed import WHOLE, Speed, Timed, Timing
from runtime.bundle.manifest import Bundle, Submodel
from runtime.errors import BundleError, InvalidInput, ResourceExhausted

PAGE: Final = "report.html"
FLOAT32: Final = 4
FLOAT16: Final = 2
"""Bytes of a parameter."""
BUSY: Final = 0.15
"""Above this share of the processors' time, other programs disturbed the timing."""


@dataclass(frozen=True)
class Size:
    """How many parameters a submodel has, and the bytes of its graph and weights in the bundle."""

    name: str
    precision: str
    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits of the bundle for each parameter, scales and graph included."""
        return 8 * self.nbytes / (self.parameters or 1)


@dataclass(frozen=True)
class Bar:
    """One of the compared times. `share` is its share of the slowest one, 0 to 1.

    `against_torch` and `against_float` are its speedups over these; None where these were not timed.
    """

    timed: Timed
    share: float
    against_torch: float | None
    against_float: float | None


def report(bundle: Bundle, output: Path, speed: Speed | None = None) -> None:
    """Write the page of a bundle's quality to the file `output`; it appears whole or not at all.

    `speed` is shown in place of that in the bundle. Raises NotFound when the bundle holds no quality report,
    BundleError when that or a graph is damaged, InvalidInput when `output` is a folder, ResourceExhausted when it
    cannot be written.
    """
    quality = load_quality(bundle)
    page = render(bundle, quality if speed is None else quality.model_copy(update={"speed": speed}))
    check_output(output)
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {output}: {error.strerror}. Choose another place") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """Raise InvalidInput or ResourceExhausted when no page can be written to `output`."""
    if output.is_dir():
        raise InvalidInput(
            "output", f"{output} is a folder, expected the name of a file such as {output / 'report.html'}"
        )
    check_writable(output)


def render(bundle: Bundle, quality: Quality) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    found_sizes = sizes(bundle)
    parameters, nbytes = (sum(getattr(one, name) for one in found_sizes) for name in ("parameters", "nbytes"))
    found = {floor: quality.found(floor.measure) for floor in floors(quality.quant)}
    shared = {"quality": quality, "cap": CAP_DB}
    sections = [
        environment.from_string(task.page).make_module(shared | task.shown(bundle, results) | {"results": results})
        for task, results in quality.compared()
    ]
    return environment.get_template(PAGE).render(
        manifest=bundle.manifest,
        sections=sections,
        sizes=found_sizes,
        all=Size("all", "", parameters, nbytes),
        parameters=parameters,
        nbytes=nbytes,
        float32=FLOAT32,
        float16=FLOAT16,
        whole=WHOLE,
        disturbed=bool(quality.speed and (quality.speed.others or 0) > BUSY),
        devices=_devices(quality),
        bars=bars,
        fastest=_fastest(quality),
        shortfalls=quality.shortfalls(quality.quant),
        floors=[(floor, min(figures.values())) for floor, figures in found.items() if figures],
        least=next((floor for floor in found if floor.measure == SNR), None),
        **shared,
    )


def sizes(bundle: Bundle) -> list[Size]:
    """The size of every submodel. Raises BundleError when a graph cannot be read."""
    return [
        Size(one.name, str(one.precision), _parameters(bundle, one), one.nbytes) for one in bundle.manifest.submodels
    ]


def _parameters(bundle: Bundle, submodel: Submodel) -> int:
    """Parameters of the submodel's graph: its numbers without quantization scales, indices and shapes."""
    path = bundle.root / submodel.graph
    try:
        graph = ir.load(path).graph
    except Exception as error:  # the reader of the format raises a dozen unrelated classes
        raise BundleError(
            f"{path} cannot be read: {type(error).__name__}. Verify the bundle, or build it again"
        ) from None
    return sum(
        prod(value.shape.numpy())
        for value in graph.initializers.values()
        if value.shape is not None and _is_parameter(value)
    )


def _is_parameter(value: ir.Value) -> bool:
    return value.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) and not _is_scale(value)


def _is_scale(value: ir.Value) -> bool:
    """Whether it is a scale or zero point: the second or third input of quantization nodes, perhaps cast or reshaped
    before.
    """
    uses = list(value.uses())
    return bool(uses) and all(
        index > 0 if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        else node.op_type in ("Cast", "Reshape") and _is_scale(node.outputs[0])
        for node, index in uses
    )  # fmt: skip


def bars(timing: Timing) -> Iterator[Bar]:
    """The times of one kind of call, in the order of the run."""
    slowest = max(timed.spread.median for timed in timing.times)
    for timed in timing.times:
        torch, floating = timing.of("torch", "none"), timing.of(timed.target, "none")
        yield Bar(
            timed,
            timed.spread.median / slowest if slowest else 0.0,
            _times_as_fast(timed, torch) if timed.target != "torch" else None,
            _times_as_fast(timed, floating) if timed.quant != "none" else None,
        )


def _times_as_fast(timed: Timed, other: Timed | None) -> float | None:
    return other.spread.median / timed.spread.median if other and timed.spread.median else None


def _fastest(quality: Quality) -> tuple[Timing, Bar] | None:
    """The fastest quantized engine in the calls that take most of a request, if anything was timed."""
    if quality.speed is None or not quality.speed.timings:
        return None
    main = quality.speed.main
    found = [bar for bar in bars(main) if bar.timed.quant != "none"]
    return (main, min(found, key=lambda bar: bar.timed.spread.median)) if found else None


def _devices(quality: Quality) -> list[str]:
    """Every device that something was timed on, once."""
    timings = quality.speed.timings if quality.speed else ()
    return list(dict.fromkeys(timed.device for timing in timings for timed in timing.times))
