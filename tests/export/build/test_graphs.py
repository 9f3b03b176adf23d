"""Graphs from config files alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import onnx
import pytest

from export.build.build import build
from export.build.graphs import build_graphs
from export.build.options import Options
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.errors import InvalidInput, SourceError
from tests.export.families.blip import T5, save


@pytest.fixture
def configs(tiny_vlm: Path, tmp_path: Path) -> Path:
    """A checkpoint's folder without its weights."""
    return shutil.copytree(tiny_vlm, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors*"))


def test_graphs_need_no_weights_and_equal_those_of_a_build(configs: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    graphs, _ = build_graphs(str(configs), tmp_path / "graphs")
    bundle = build(Options(str(tiny_vlm), tmp_path / "bundle", ("onnxruntime",), parity="twin"))[0]
    listed = json.loads((tmp_path / "graphs" / "graphs.json").read_bytes())
    assert listed == [one.model_dump(mode="json") for one in graphs]
    by_name = {one.submodel: one for one in graphs}
    for submodel in bundle.manifest.submodels:
        found = by_name[submodel.name]
        assert found.signature == submodel.signature and found.parity.method == "twin"
        graph = onnx.load(tmp_path / "graphs" / f"{submodel.name}.onnx", load_external_data=False).graph
        assert [one.name for one in graph.input] == [one.name for one in submodel.signature.graph_inputs]
        absent = [one for one in graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
        assert found.nodes == len(graph.node) and absent
        assert sum(math.prod(one.dims) for one in absent) == found.weights


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_that_of_the_config_file(tied: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "t5", T5)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    config = json.loads((folder / "config.json").read_bytes())
    config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve(str(folder), weights=False)
    (model,) = {
        id(c.model): c.model for part in family_of(source).parts(source, True) for c in part.components
    }.values()
    assert ("language_model.lm_head.weight" in model.all_tied_weights_keys) == tied


def test_a_folder_of_graphs_is_replaced_by_force_alone_and_nothing_else_ever(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "graphs.json").write_text("[]")
    with pytest.raises(InvalidInput, match=r"holds another folder of graphs: .*--force"):
        build_graphs(str(configs), tmp_path / "graphs")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    with pytest.raises(InvalidInput, match="exists and is no folder of graphs"):
        build_graphs(str(configs), tmp_path / "photos", force=True)
    config = json.loads((configs / "config.json").read_bytes())
    config["vision_config"]["hidden_act"] = "unheard-of"
    (configs / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError):
        build_graphs(str(configs), tmp_path / "new")
    assert not (tmp_path / "new").exists()
