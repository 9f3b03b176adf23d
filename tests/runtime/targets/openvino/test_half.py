"""Decoders in bfloat16 on OpenVINO: near to float32 at every position, caches in pages of 8 bits that do not depend on
the calls that wrote them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle
from runtime.bundle.precision import Compute
from runtime.bundle.signature import Array
from runtime.engine import Options, Slot
from runtime.placing.containers import Allowance
from runtime.targets.openvino import deciding, settings
from runtime.targets.openvino.engine import OpenVINO
from runtime.targets.openvino.pages import has_pages
from runtime.targets.openvino.settings import (
    CHOICES,
    has_bfloat16,
    multiplies_bfloat16,
    settings_for,
    shared_core,
    where_of,
)

LONG = 900
"""Positions of a prompt that is nearly as long as the sample's context: angles of rotary embeddings in bfloat16 would
be wrong by radians there.
"""


@pytest.fixture(scope="module")
def half(vlm_bundle: Path) -> Any:
    """The decoder of the sample, which computes in bfloat16."""
    if not (has_bfloat16(shared_core()) and multiplies_bfloat16()):
        pytest.skip("this processor does not multiply bfloat16")
    return load(vlm_bundle, compute="bfloat16")


def load(root: Path, allowed: Compute = "bfloat16", threads: int = 2, **settings: str) -> Any:
    submodel = Bundle(root).submodel("decoder")
    precision = submodel.precision.model_copy(update={"compute": allowed})
    options = Options(threads=threads, settings=settings)
    return OpenVINO.load(submodel.model_copy(update={"precision": precision}), root, options)


def run(engine: Any, embeds: Array, *lengths: int) -> Array:
    """The logits of the last position, of calls of these lengths in turn."""
    slot, start, found = Slot(), 0, {}
    for length in lengths:
        stop = start + length
        found = engine.run(
            {
                "inputs_embeds": embeds[:, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
            },
            slot,
        )
        start = stop
    return found["logits"]


def snr_db(got: Array, wanted: Array) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()))


def embeddings(engine: Any) -> Array:
    hidden = engine.submodel.signature.inputs[0].dims[-1]
    return np.random.default_rng(0).standard_normal((1, LONG, hidden)).astype(np.float32)


def test_it_says_how_it_computes(half: Any) -> None:
    assert half.computes == "bfloat16" and "in bfloat16" in half.device
    assert has_pages(half._compiled) == ("caches in states" not in half.device)


@pytest.mark.parametrize("length", [4, LONG])
def test_it_is_near_to_float32_at_every_position(half: Any, vlm_bundle: Path, length: int) -> None:
    embeds = embeddings(half)[:, :length]
    exact = run(load(vlm_bundle, "float32"), embeds, length)
    assert 30 < snr_db(run(half, embeds, length), exact) < 100


def test_what_is_held_does_not_depend_on_the_calls_that_wrote_it(half: Any) -> None:
    embeds = embeddings(half)[:, :70]
    assert snr_db(run(half, embeds, 69, 1), run(half, embeds, 30, 7, 1, 31, 1)) > 35


def test_with_one_thread_it_computes_in_float32(half: Any, vlm_bundle: Path) -> None:
    alone = load(vlm_bundle, threads=1, compute="bfloat16")
    assert alone.computes == "float32" and "bfloat16" not in alone.device
    embeds = embeddings(half)[:, :4]
    assert np.array_equal(run(alone, embeds, 4), run(load(vlm_bundle, "float32", threads=1), embeds, 4))


@pytest.mark.parametrize(("found", "paid", "least"), [(2, 2, 2), (1, 2, 1), (4, 1, 1), (0, 3, 3)])
def test_the_threads_of_a_container_are_those_that_its_quota_pays_for(
    monkeypatch: pytest.MonkeyPatch, found: int, paid: int, least: int
) -> None:
    monkeypatch.setattr(settings, "cores", lambda: found)
    monkeypatch.setattr(settings, "allowance", lambda: Allowance(paid))
    assert settings.threads(Options()) == least
    assert settings.threads(Options(threads=5)) == 5


def test_where_products_are_wrong_it_computes_in_float32(
    vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "BFLOAT16_ERROR", 0.0)
    monkeypatch.setattr(settings, "has_bfloat16", lambda core: True)
    multiplies_bfloat16.cache_clear()
    try:
        assert load(vlm_bundle, compute="bfloat16").computes == "float32"
    finally:
        multiplies_bfloat16.cache_clear()
    assert "multiplies bfloat16 wrongly on this processor" in caplog.text


def test_groups_of_8_bits_are_for_float32(half: Any) -> None:
    submodel, options = half.submodel.model_copy(update={"dynamic": True}), Options(threads=2)
    groups = {}
    for compute in CHOICES["compute"]:
        config = settings_for(shared_core(), submodel, where_of(options), options, {"compute": compute})
        groups[config["INFERENCE_PRECISION_HINT"]] = config["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    assert groups == {"f32": "64", "bf16": "0"}


@pytest.mark.parametrize(("slow", "chosen"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_bfloat16_is_chosen_where_it_is_faster(
    half: Any, vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: str, chosen: str
) -> None:
    def call(self: object, values: Mapping[str, str]) -> Callable[[], object]:
        return lambda: time.sleep(0.004 if values["compute"] == slow else 0.001)

    monkeypatch.setattr(deciding._Parts, "__call__", call)
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
    monkeypatch.delenv("ENGINECAST_CHOICES")
    engine = load(vlm_bundle)
    assert engine.computes == chosen and engine.decisions["compute"].value == chosen


def test_bfloat16_is_no_choice_of_bundles_that_do_not_allow_it(vlm_bundle: Path) -> None:
    engine = load(vlm_bundle, "float32", compute="bfloat16")
    assert engine.computes == "float32" and "compute" not in engine.decisions
