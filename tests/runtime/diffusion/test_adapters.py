"""LoRA files of a bundle: each has rows of its own in the inputs of the submodels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.diffusion.adapters import DOWN, UP, Adapters, adapted
from runtime.engine import Slot
from runtime.errors import BundleError, InvalidInput
from runtime.pipeline import Call, Pipeline, Progress

safetensors = pytest.importorskip("safetensors.numpy")


def saved(root: Path, name: str, rank: int, value: float, *submodels: str) -> None:
    (root / "adapters").mkdir(exist_ok=True)
    both = {f"{submodel}.{which}": width for submodel in submodels for which, width in ((DOWN, 3), (UP, 2))}
    tensors = {key: np.full((rank, width), value, np.float32) for key, width in both.items()}
    safetensors.save_file(tensors, root / "adapters" / f"{name}.safetensors")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    saved(tmp_path, "a", 1, 1.0, "unet", "text_encoder")
    saved(tmp_path, "b", 2, 2.0, "unet")
    return tmp_path


def test_rows_of_each_lora_do_not_depend_on_the_others(bundle: Path) -> None:
    adapters = Adapters.open(bundle)
    both, none = adapters.inputs({"b": 0.5, "a": 3.0}), adapters.inputs({})
    assert {name: sorted(inputs) for name, inputs in both.items()} == dict.fromkeys(
        ("unet", "text_encoder"), sorted((DOWN, UP))
    )
    assert both["unet"][UP].tolist() == [[3, 3], [1, 1], [1, 1]]
    assert both["unet"][DOWN].tolist() == [[1] * 3, [2] * 3, [2] * 3]
    assert both["text_encoder"][UP].tolist() == [[3, 3], [0, 0], [0, 0]]  # b has nothing to add there
    assert adapters.inputs({"b": 0.5})["unet"][UP].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert not any(array.any() for inputs in none.values() for array in inputs.values())


def test_names_that_are_not_there_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"loras: there is no LoRA 'c': .*known: a, b"):
        Adapters.open(bundle).inputs({"c": 1.0})
    with pytest.raises(InvalidInput, match="built without --adapter"):
        Adapters().inputs({"c": 1.0})


def test_damaged_files_are_refused(bundle: Path) -> None:
    for tensors in (
        {"unet.other": np.ones((1, 3), np.float32)},
        {f"unet.{UP}": np.ones((1, 3), np.float32)},
        {f"unet.{UP}": np.ones((1, 3), np.float16), f"unet.{DOWN}": np.ones((1, 3), np.float16)},
        {f"unet.{UP}": np.ones((1, 3), np.float32), f"unet.{DOWN}": np.ones((2, 3), np.float32)},
    ):
        safetensors.save_file(tensors, bundle / "adapters" / "a.safetensors")
        with pytest.raises(BundleError, match=r"a\.safetensors cannot be read"):
            Adapters.open(bundle)


def test_calls_get_the_inputs_of_their_submodel() -> None:
    def inner() -> Pipeline:
        outputs = yield Call("unet", {"x": np.ones(1)}, slot)
        yield Progress(1, 1)
        assert outputs == {"y": 1}
        yield Call("vae", {"z": np.ones(1)})

    slot = Slot()
    pipeline = adapted(inner(), {"unet": {DOWN: np.zeros((1, 1), np.float32)}})
    first = next(pipeline)
    assert isinstance(first, Call) and sorted(first.inputs) == [DOWN, "x"] and first.slot is slot
    assert pipeline.send({"y": 1}) == Progress(1, 1)  # type: ignore[dict-item]
    last = next(pipeline)
    assert isinstance(last, Call) and list(last.inputs) == ["z"]
