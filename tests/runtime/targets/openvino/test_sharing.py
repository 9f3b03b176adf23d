"""Rows that begin alike: the same result, from less work, and only where they are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array
from runtime.engine import Options
from runtime.targets.openvino.engine import OpenVINO
from runtime.targets.openvino.settings import shared_core
from runtime.targets.openvino.sharing import guided, has_conditions, share_rows

LENGTHS = {"batch": 2, "sequence": 7}


def denoiser(bundle: Path) -> Submodel:
    """A float UNet that says it were W8A8, so that it is compiled for each shape: float results can be compared to the
    last digits.
    """
    return Bundle(bundle).submodel("unet").model_copy(update={"precision": Precision.parse("int8 W8A8")})


def call(submodel: Submodel, alike: bool) -> dict[str, Array]:
    """Two rows at the smallest picture of four positions a side or more; only conditions differ where they
    are `alike`.
    """
    lengths = {name: LENGTHS.get(name, max(8, dim.min)) for name, dim in submodel.signature.dims.items()}
    inputs = submodel.signature.sample(lengths)
    if alike:
        inputs |= {
            t.name: np.repeat(inputs[t.name][:1], 2, axis=0) for t in submodel.signature.inputs if not t.condition
        }
    return inputs


@pytest.mark.parametrize("alike", [True, False])
def test_the_result_is_the_same(diffusion_bundle: Path, alike: bool) -> None:
    root, submodel = diffusion_bundle, denoiser(diffusion_bundle)
    inputs = call(submodel, alike)
    assert guided(submodel.signature, inputs) == alike
    plain = OpenVINO.load(Bundle(root).submodel("unet"), root, Options())
    fixed = OpenVINO.load(submodel, root, Options())
    assert isinstance(fixed, OpenVINO)
    expected, found = plain.run(inputs)["noise_pred"], fixed.run(inputs)["noise_pred"]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "the prompts make a difference"
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert [key.guided for key in fixed._fixed] == [True, alike]  # the usual one, compiled on loading, and this


def test_a_single_row_shares_nothing(diffusion_bundle: Path) -> None:
    submodel = denoiser(diffusion_bundle)
    inputs = {name: array[:1] for name, array in call(submodel, True).items()}
    assert not guided(submodel.signature, inputs)
    assert OpenVINO.load(submodel, diffusion_bundle, Options()).run(inputs)["noise_pred"].shape[0] == 1


def test_what_no_prompt_takes_part_in_has_one_row(diffusion_bundle: Path) -> None:
    submodel = denoiser(diffusion_bundle)
    model = shared_core().read_model(diffusion_bundle / submodel.graph)
    model.reshape({name: list(array.shape) for name, array in call(submodel, True).items()})
    before = {
        node.get_friendly_name(): list(node.output(0).get_shape())
        for node in model.get_ordered_ops()
        if node.get_output_size()
    }
    share_rows(model, submodel.signature)
    after = {
        node.get_friendly_name(): list(node.output(0).get_shape())
        for node in model.get_ordered_ops()
        if node.get_output_size()
    }
    narrowed = {name for name, shape in before.items() if shape[:1] == [2] and after[name] == [1, *shape[1:]]}
    attentions = [name for name in before if name.endswith("/Attention")]
    assert len([name for name in attentions if name in narrowed]) == 1 < len(attentions)
    assert any(name.startswith("time_embedding") for name in narrowed)


@pytest.mark.parametrize(
    ("bundle", "expected"), [("diffusion_bundle", ["unet"]), ("xl_bundle", []), ("vlm_bundle", [])]
)
def test_what_has_conditions(bundle: str, expected: list[str], request: pytest.FixtureRequest) -> None:
    """Not Stable Diffusion XL: its time embedding holds a prompt."""
    manifest = Bundle(request.getfixturevalue(bundle)).manifest
    assert [one.name for one in manifest.submodels if has_conditions(one.signature)] == expected
