"""Devices by name, and those made of others; calls of the least lengths leave other calls as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.engine import Options
from runtime.errors import EngineUnavailable
from runtime.targets.openvino.compiling import Made, compiled_for
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.engine import OpenVINO
from runtime.targets.openvino.fixed import is_least


def core(*devices: str, places: dict[str, str] | None = None) -> Any:
    """An SDK that has these devices; `places` is where its nodes run."""
    return SimpleNamespace(available_devices=list(devices), query_model=lambda model, name: places)


@pytest.mark.parametrize(
    ("name", "parts", "cpu"),
    [
        ("", ("CPU",), True),
        ("CPU", ("CPU",), True),
        ("GPU.1", ("GPU.1",), False),
        ("GPU", ("GPU",), False),
        ("AUTO", ("CPU", "GPU.0", "GPU.1"), False),
        ("AUTO:GPU.1,CPU", ("GPU.1", "CPU"), False),
        ("AUTO:-CPU,GPU", ("GPU",), False),
        ("HETERO:CPU", ("CPU",), True),
        ("BATCH:GPU.0(4)", ("GPU.0",), False),
    ],
)
def test_what_a_device_uses(name: str, parts: tuple[str, ...], cpu: bool) -> None:
    where = Where.of(core("CPU", "GPU.0", "GPU.1"), name)
    assert (where.parts, where.cpu) == (parts, cpu)


@pytest.mark.parametrize("name", ["NPU", "cpu", "HETERO:NPU,CPU", "AUTO:GPU", "TPU:1", "MULTI:CPU,"])
def test_a_part_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(EngineUnavailable, match=r"has no device '.*' here: it found CPU"):
        Where.of(core("CPU"), name)


def test_what_hetero_computes_elsewhere() -> None:
    places = {"conv": "GPU.0", "loop": "CPU", "add": "GPU.0", "where": "CPU"}
    sdk = core("CPU", "GPU.0", places=places)
    assert Where.of(sdk, "HETERO:GPU.0,CPU").fallbacks(sdk, None) == ("2 of 4 nodes on CPU",)
    assert Where.of(sdk, "AUTO:GPU.0,CPU").fallbacks(sdk, None) == ()


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU"])
def test_devices_made_of_others_compute_the_same(tiny_bundle: Path, device: str) -> None:
    submodel = Bundle(tiny_bundle).submodel("vision_encoder")
    feed = {
        tensor.name: array
        for tensor, array in zip(submodel.signature.inputs, _sample(submodel, 2).values(), strict=True)
    }
    found = []
    for name in ("CPU", device):
        engine = OpenVINO.load(submodel, tiny_bundle, Options(device=name, threads=1))
        found.append(engine.run(feed))
        assert name in engine.device and engine.fallbacks == () and engine.computes == "float32"
        engine.close()
    for name, array in found[0].items():
        np.testing.assert_allclose(found[1][name], array, rtol=1e-4, atol=1e-5)


def _sample(submodel: Any, batch: int) -> dict[str, Array]:
    lengths = {name: dim.opt for name, dim in submodel.signature.dims.items()} | {"batch": batch, "images": batch}
    rng = np.random.default_rng(0)
    return {tensor.name: tensor.sample(lengths, rng) for tensor in submodel.signature.inputs}


def test_calls_of_the_least_lengths_leave_others_as_they_are(diffusion_bundle: Path) -> None:
    submodel = Bundle(diffusion_bundle).submodel("unet")
    dims, rng = submodel.signature.dims, np.random.default_rng(0)
    usual = {name: dim.opt for name, dim in dims.items()} | {"batch": 1}
    least = {name: dim.min for name, dim in dims.items()} | {"batch": 1}
    feeds = [
        {tensor.name: tensor.sample(lengths, rng) for tensor in submodel.signature.inputs} for lengths in (least, usual)
    ]
    assert [is_least(submodel.signature, {name: array.shape for name, array in feed.items()}) for feed in feeds] == [
        True,
        False,
    ]
    fresh, used = (OpenVINO.load(submodel, diffusion_bundle, Options(threads=1)) for _ in range(2))
    (wanted,) = fresh.run(feeds[1]).values()
    used.run(feeds[0])
    (found,) = used.run(feeds[1]).values()
    ratio = 10 * np.log10(np.square(wanted).sum() / max(np.square(wanted - found).sum(), 1e-30))
    print(f"after the least lengths: {ratio:.0f} dB to a fresh engine")
    assert ratio > 100
    fresh.close()
    used.close()


def test_a_table_is_compiled_once_for_all_shapes(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submodel, compiled = Bundle(tiny_bundle).submodel("token_embedding"), []

    def noting(*arguments: Any) -> Made:
        compiled.append(arguments)
        return compiled_for(*arguments)

    monkeypatch.setattr("runtime.targets.openvino.engine.compiled_for", noting)
    engine = OpenVINO.load(submodel, tiny_bundle, Options(threads=1))
    ids = np.random.default_rng(0).integers(0, 200, (2, 7))
    (wanted,) = engine.run({"input_ids": ids}).values()
    for row in range(2):
        for position in range(7):
            (found,) = engine.run({"input_ids": ids[row : row + 1, position : position + 1]}).values()
            np.testing.assert_array_equal(found[0, 0], wanted[row, position])
    (again,) = engine.run({"input_ids": ids}).values()
    np.testing.assert_array_equal(again, wanted)
    assert len(compiled) == 1
    engine.close()
