"""The graphs that compiling writes, and what is loaded of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from runtime.bundle.manifest import Artifact, Bundle
from runtime.engine import Compiled, Options
from runtime.targets.onnxruntime.engine import ONNXRuntime


def test_attention_without_a_mask_is_computed_in_blocks(tiny_bundle: Path, tmp_path: Path) -> None:
    """That of the vision encoder is, whose second layer is not read. A bundle of before, which has no such graph,
    computes the same.
    """
    bundle = Bundle(tiny_bundle)
    (artifact,) = bundle.artifacts("onnxruntime", "vision_encoder")
    assert artifact.files == ("vision_encoder.fused.onnx",)
    stored = ir.load(tiny_bundle / bundle.engine_folder(artifact) / artifact.files[0])
    kinds = [node.op_type for node in stored.graph]
    assert kinds.count("MultiHeadAttention") == 1 and "Attention" not in kinds

    submodel = bundle.submodel("vision_encoder")
    feed = submodel.signature.sample({name: dim.opt for name, dim in submodel.signature.dims.items()})
    older = Compiled(Artifact(target="onnxruntime", submodel="vision_encoder"), tmp_path)
    new, old = (
        ONNXRuntime.load(submodel, tiny_bundle, Options(threads=1, compiled=compiled)).run(feed)
        for compiled in (None, older)
    )
    assert new.keys() == old.keys()
    for name, values in new.items():
        np.testing.assert_allclose(values, old[name], atol=1e-5)


def test_attention_with_a_mask_stays(diffusion_bundle: Path) -> None:
    (artifact,) = Bundle(diffusion_bundle).artifacts("onnxruntime", "text_encoder")
    assert not artifact.files
