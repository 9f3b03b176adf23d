"""A decoder's lowered graph computes the logits of as many positions as its caller requests, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError
from runtime.targets.lowering.logits import START, with_logits_start


def test_the_head_computes_the_requested_positions(tiny_bundle: Path) -> None:
    submodel = Bundle(tiny_bundle).submodel("decoder")
    signature, graph = submodel.signature, tiny_bundle / submodel.graph
    model = ir.load(graph)
    with_logits_start(model, signature)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    content = ir.to_proto(model).SerializeToString()
    changed = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    canonical = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    whole = signature.sample(signature.decoder.lengths(past=3, sequence=5))
    for count in (1, 2, 5):
        (got,) = changed.run(["logits"], whole | {START: np.array([-count])})
        assert got.shape[:2] == (1, count), "the head reads no other position"
    start, wanted = 3, []
    for end in (4, 5):
        inputs = signature.cut({tensor.name: whole[tensor.name] for tensor in signature.inputs}, 0, end)
        states = {state.past.name: whole[state.past.name] for state in signature.states}
        wanted += canonical.run(["logits"], inputs | states)
    np.testing.assert_allclose(got[:, start:], np.concatenate(wanted, 1), rtol=1e-4, atol=1e-5)


def test_a_graph_that_takes_another_position_is_refused(tiny_bundle: Path) -> None:
    submodel = Bundle(tiny_bundle).submodel("decoder")
    model = ir.load(tiny_bundle / submodel.graph)
    with_logits_start(model, submodel.signature)
    with pytest.raises(EngineError, match="logits are not those of its last position"):
        with_logits_start(model, submodel.signature)
