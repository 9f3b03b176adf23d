from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.engine import FakeEngine, Options, targets
from runtime.errors import InvalidInput
from runtime.placing import heap, memory
from runtime.placing.memory import Need, estimate, parse_size, show_size

EDGE = Dim(name="height", min=2, opt=8, max=128, multiple=2)
LATENTS = Tensor(name="latents", dtype="float32", dims=(BATCH, 4, EDGE, EDGE.model_copy(update={"name": "width"})))


def submodel(precision: str, compute: Any = "float32", nbytes: int = 1000) -> Submodel:
    signature = Signature(inputs=(LATENTS,), outputs=())
    return Submodel(
        name="vae_decoder", signature=signature, graph="g", precision=Precision.parse(precision, compute), nbytes=nbytes
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512MB", 512_000_000),
        ("1.5 gib", 3 << 29),
        ("1000", 1000),
        ("7B", 7),
        ("2kb", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("memory_limit", text) == size


@pytest.mark.parametrize("text", ["", "4 elephants", "-1GiB", "0", "GiB", "1e9", "4GiB!", "nan", "٤GiB", "9" * 99])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^memory_limit: is '.*expected a size above 0 such as 4GiB or 512MB"):
        parse_size("memory_limit", text)


@given(st.integers(1, 1 << 45))
def test_sizes_are_shown_as_they_are_read(size: int) -> None:
    assert parse_size("", show_size(size)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "compute", "half", "host", "factor"),
    [
        ("float32", "float32", False, True, 2), ("float16", "float32", False, True, 4), ("int8 W8A8", "float32", False,
            True, 2),
        ("int4 + int8 + float16", "float32", False, True, 3), ("float16", "float16", True, True, 2), ("float16",
            "float16", False, True, 4),
        ("int8 W8A8", "float32", True, False, 1), ("float16", "float16", True, False, 1), ("float16", "float32", True,
            False, 2),
        ("int4 + int8 W4A8", "float32", False, True, 4),
    ],
)  # fmt: skip
def test_estimates(precision: str, compute: Any, half: bool, host: bool, factor: int) -> None:
    assert estimate(submodel(precision, compute), half, host) == 1000 * factor + memory.OVERHEAD


def test_what_a_submodel_takes_is_continued_in_a_straight_line() -> None:
    """An engine that takes 1 MB and 50 bytes for each byte of its inputs."""
    taken = [0]

    def run(inputs: Any) -> dict[str, Any]:
        taken[0] = max(taken[0], 10**6 + 50 * memory.size_of(inputs))
        return {}

    engine = FakeEngine(run)
    engine.submodel = submodel("int8")
    need = memory.measure(engine, 500, lambda: 500 + taken[0], 7)
    assert need.slope == pytest.approx(50 * memory.MARGIN)
    assert need.base == pytest.approx(10**6 * memory.MARGIN + memory.OVERHEAD // 4, rel=0.01)
    assert need.at(1000) == pytest.approx(need.base + 55_000) and need.inputs_within(need.at(1000)) == pytest.approx(
        1000, rel=0.01
    )
    assert need.inputs_within(0) == 0 and Need(5).inputs_within(9) == float("inf")
    assert memory.measure(engine, 0, lambda: None, 7) == Need(7), "what cannot be seen stays estimated"


def test_samples_are_small_and_valid() -> None:
    signature = Signature(inputs=(LATENTS,), outputs=())
    for share in (4, 2):
        inputs = memory.sample(signature, share)
        assert signature.bind(inputs)["height"] == min(8, 8 // share * 2)


@pytest.mark.skipif(memory.of_process() is None, reason="the system does not tell what a process has")
def test_memory_of_this_process() -> None:
    before = memory.of_process()
    block = np.ones(1 << 24)
    after = memory.of_process()
    assert before and after and 0.9 * block.nbytes < after - before < 2 * block.nbytes
    heap.give_back()


@pytest.mark.skipif(memory.of_process() is None, reason="the system does not tell what a process has")
@pytest.mark.parametrize("kind", ["diffusion", "vlm"])
def test_estimates_beside_what_real_engines_take(
    target: str, kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both samples on every target: the estimate is never less than half of what was measured."""
    root: Path = request.getfixturevalue(f"{kind}_bundle")
    lines = []
    for one in Bundle(root).manifest.submodels:
        heap.give_back()
        before = memory.of_process() or 0
        engine = targets()[target].load(one, root, Options(threads=1))
        wanted = estimate(one, one.precision.compute in engine.precisions, True)
        found = memory.measure(engine, before, memory.of_process, wanted)
        taken = (memory.of_process() or 0) - before
        engine.close()
        lines.append(
            f"{target} {one.name} {one.precision}: estimated {show_size(wanted)}, took {show_size(max(0, taken))}, "
            f"{found}"
        )
        assert wanted >= taken / 2
        time.sleep(0)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
