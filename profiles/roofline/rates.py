"""Measures the roofline of this machine: the bandwidth of its memory, and the rate of a large matrix product on each
target in each precision that it computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from calibration.ground import machine
from profiles.bench import Say, of_one_run
from profiles.memory import GB
from profiles.rows import Row
from runtime.engine import Compiled, Engine, Options, target
from runtime.errors import EngineError, MissingDependency
from runtime.placing.fingerprint import here
from runtime.placing.processor import processor
from runtime.timing import Spread, seconds, turns

BANDWIDTH: Final = "bandwidth"
PRODUCT: Final = "product"
MACHINE: Final = "machine"
"""The source of rows that are of no model."""
GIGA: Final = 1e9
TIMES: Final = 5


def roofline(names: Sequence[str], threads: int, say: Say = lambda line: None) -> list[Row]:
    """Rows of the bandwidth and of the products on these targets. Raises MissingDependency without the extra export."""
    try:
        from profiles.roofline import products
    except ImportError as error:
        raise MissingDependency(error.name or "onnx_ir", "export") from None
    reads = [machine.read_bandwidth(repeat=1) / GB for _ in range(TIMES)]
    say(f"memory is read at {max(reads):.1f} GB/s")
    rows = [_row(BANDWIDTH, "GB/s", reads, ("numpy", "cpu", "none"), threads, {"bytes": 1 << 29})]
    with TemporaryDirectory() as folder:
        made = {form: products.product(form, Path(folder)) for form in products.PRECISIONS}
        for name in names:
            engine = target(name)
            for form in products.PRECISIONS:
                if form in engine.precisions:
                    rates, device = _rates(engine, made[form], Path(folder), threads, products.OPERATIONS, say)
                    if rates:
                        of, sizes = (name, device, form), {"edge": products.EDGE}
                        rows.append(_row(PRODUCT, "Gop/s", rates, of, threads, sizes))
    return of_one_run(rows)


def _rates(
    engine: type[Engine], product: Any, root: Path, threads: int, operations: int, say: Say
) -> tuple[list[float], str]:
    """Billions of operations a second of one product, and the device; none, said, where the target refuses it."""
    folder = root / "engines" / engine.target
    try:
        artifact = engine.compile(product, root / product.graph, folder)
        loaded = engine.load(product, root, Options(threads=threads, compiled=Compiled(artifact, folder)))
    except EngineError as error:
        say(f"a product in {product.name} cannot be measured on {engine.target}: {error}")
        return [], ""
    try:
        inputs = product.signature.sample({})
        run: Callable[[], float] = lambda: operations / GIGA / seconds(lambda: loaded.run(inputs))  # noqa: E731
        (rates,) = turns([run], TIMES)
    finally:
        loaded.close()
    say(f"products in {product.name} on {engine.target}: {np.median(rates):.0f} billion operations a second")
    return rates, loaded.device


def _row(
    metric: str,
    unit: str,
    values: Sequence[float],
    of: tuple[str, str, str],
    threads: int,
    settings: Mapping[str, int | float | str],
) -> Row:
    name, device, form = of
    return Row(
        metric=metric,
        unit=unit,
        spread=Spread.of(values),
        values=tuple(values),
        program=machine.program(),
        bundle="",
        source=MACHINE,
        quant=form,
        target=name,
        device=device,
        cpu=processor(),
        threads=threads or machine.threads(),
        settings=settings,
        versions=machine.versions(),
        date=datetime.now(UTC),
        fingerprint=here(),
    )
