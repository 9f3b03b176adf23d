"""What every engine promises, for every target that is found: it gives what torch gives, and keeps the states of slots
apart.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.engine import Engine, Options, Slot, targets
from runtime.errors import EngineError, EngineUnavailable

SAMPLES = Path(__file__).parents[3] / "samples"
FLOOR = 1e-4
Loader = Callable[[str], Engine]


@pytest.fixture
def load(target: str, diffusion_bundle: Path, vlm_bundle: Path) -> Iterator[Loader]:
    """Load a submodel of either sample on the target."""
    opened: list[Engine] = []

    def one(name: str) -> Engine:
        bundle = next(
            b for b in map(Bundle, (diffusion_bundle, vlm_bundle)) if name in {s.name for s in b.manifest.submodels}
        )
        opened.append(targets()[target].load(bundle.submodel(name), bundle.root, Options(threads=1)))
        return opened[-1]

    yield one
    for engine in opened:
        engine.close()


@cache
def torch_model(name: str) -> Any:
    """A component of the samples in float32, as its library loads it."""
    import diffusers
    import transformers

    if name == "vlm":
        return transformers.LlavaForConditionalGeneration.from_pretrained(
            SAMPLES / "shapes-vlm", dtype="float32"
        ).eval()
    folder = SAMPLES / "shapes-diffusion" / name
    if name == "text_encoder":
        return transformers.CLIPTextModel.from_pretrained(folder, dtype="float32").eval()
    kind: Any = diffusers.UNet2DConditionModel if name == "unet" else diffusers.AutoencoderKL
    return kind.from_pretrained(folder).float().eval()


def expected(name: str, inputs: dict[str, Array]) -> Array:
    """The one output of a stateless submodel according to torch."""
    import torch

    given = {key: torch.from_numpy(value.copy()) for key, value in inputs.items()}
    with torch.inference_mode():
        if name == "text_encoder":
            output = torch_model(name)(**given).last_hidden_state
        elif name == "unet":
            output = torch_model(name)(**given).sample
        elif name == "vae_decoder":
            output = torch_model("vae").decode(given["latents"]).sample
        elif name == "vision_encoder":
            output = torch.stack(list(torch_model("vlm").model.get_image_features(given["pixel_values"]).pooler_output))
        else:
            output = torch_model("vlm").get_input_embeddings()(given["input_ids"])
    result: Array = output.numpy()
    return result


def distance(got: Array, wanted: Array) -> float:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())  # type: ignore[operator]


STATELESS = [
    ("text_encoder", {"batch": 1, "sequence": 32}),
    ("text_encoder", {"batch": 3, "sequence": 5}),
    ("unet", {"batch": 1, "height": 8, "width": 8, "sequence": 32}),
    ("unet", {"batch": 3, "height": 4, "width": 10, "sequence": 64}),
    ("vae_decoder", {"batch": 2, "height": 4, "width": 6}),
    ("vision_encoder", {"images": 1}),
    ("vision_encoder", {"images": 3}),
    ("token_embedding", {"batch": 2, "sequence": 9}),
]


@pytest.mark.parametrize(
    ("name", "lengths"),
    STATELESS,
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.values())),
)
def test_equals_torch_at_any_size(load: Loader, name: str, lengths: dict[str, int]) -> None:
    engine = load(name)
    inputs = engine.submodel.signature.sample(lengths, seed=1)
    (got,) = engine.run(inputs).values()
    assert distance(got, expected(name, inputs)) < FLOOR


def test_one_engine_takes_one_size_after_another(load: Loader) -> None:
    engine = load("vae_decoder")
    signature = engine.submodel.signature
    runs = [
        signature.sample({"batch": batch, "height": height, "width": 4}, height)
        for batch, height in ((1, 4), (2, 8), (1, 2), (1, 4))
    ]
    results = [engine.run(inputs)["image"] for inputs in runs]
    np.testing.assert_array_equal(results[0], results[3])
    assert [result.shape for result in results[:3]] == [(1, 3, 64, 64), (2, 3, 128, 64), (1, 3, 32, 64)]


def test_outputs_belong_to_the_caller(load: Loader) -> None:
    engine = load("token_embedding")
    first = engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"]
    kept = first.copy()
    second = engine.run({"input_ids": np.array([[7, 8]])})["inputs_embeds"]
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    assert second.any()


def test_inputs_may_be_views_and_stay_as_they_are(load: Loader) -> None:
    engine = load("token_embedding")
    ids = np.arange(20).reshape(4, 5)
    before = ids.copy()
    for view in (ids.T, ids[:, ::2], ids[::-1]):
        got = engine.run({"input_ids": view})["inputs_embeds"]
        np.testing.assert_array_equal(got, engine.run({"input_ids": np.ascontiguousarray(view)})["inputs_embeds"])
    ids.setflags(write=False)
    engine.run({"input_ids": ids})
    np.testing.assert_array_equal(ids, before)


def test_a_shape_that_cannot_be_is_an_engine_error(load: Loader) -> None:
    engine = load("unet")
    inputs = engine.submodel.signature.sample({"batch": 1, "height": 4, "width": 4, "sequence": 4})
    with pytest.raises(EngineError, match="could not run unet"):
        engine.run(inputs | {"sample": inputs["sample"][:, :3]})
    assert engine.run(inputs)["noise_pred"].shape == (1, 8, 4, 4), "the engine works on"


# States


class Text:
    """A decoder run token by token, and what torch says of the same tokens."""

    def __init__(self, engine: Engine, seed: int = 0, batch: int = 1) -> None:
        self.engine, self.slot = engine, Slot()
        self.embeds = torch_model("vlm").get_input_embeddings().weight.detach().numpy()
        self.ids = np.random.default_rng(seed).integers(5, 512, (batch, 1024))
        self.length = 0

    def feed(self, count: int) -> Array:
        """The logits after `count` more tokens."""
        start, self.length = self.length, self.length + count
        batch = len(self.ids)
        inputs = {
            "inputs_embeds": self.embeds[self.ids[:, start : self.length]],
            "attention_mask": np.ones((batch, self.length), np.int64),
            "position_ids": np.broadcast_to(np.arange(start, self.length), (batch, count)),
        }
        return self.engine.run(inputs, self.slot)["logits"]

    def trim(self, length: int) -> None:
        self.engine.trim(self.slot, length)
        self.length = length

    def expected(self) -> Array:
        """torch's logits after the tokens so far, computed from the beginning."""
        import torch

        model = torch_model("vlm")
        with torch.inference_mode():
            hidden = model.model.language_model(
                input_ids=torch.from_numpy(self.ids[:, : self.length]), use_cache=False
            ).last_hidden_state
            logits: Array = model.lm_head(hidden[:, -1:]).numpy()
        return logits


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode(load: Loader, batch: int) -> None:
    text = Text(load("decoder"), batch=batch)
    for count in (7, 1, 1, 4, 1):
        assert distance(text.feed(count), text.expected()) < FLOOR


def test_states_grow_past_any_first_capacity(load: Loader) -> None:
    text = Text(load("decoder"))
    for count in (250, 5, 1, 1, 1, 300, 1):
        assert distance(text.feed(count), text.expected()) < FLOOR


def test_trimmed_positions_are_forgotten(load: Loader) -> None:
    text = Text(load("decoder"))
    text.feed(9)
    text.feed(1)
    text.trim(4)
    text.ids[:, 4:] = text.ids[:, 20:21]
    for count in (3, 1):
        assert distance(text.feed(count), text.expected()) < FLOOR
    text.trim(0)
    text.ids = text.ids[:, ::-1].copy()
    for count in (5, 1):
        assert distance(text.feed(count), text.expected()) < FLOOR


def test_a_slot_begun_anew_may_have_another_batch(load: Loader) -> None:
    engine = load("decoder")
    text, wider = Text(engine), Text(engine, seed=1, batch=2)
    text.feed(6)
    text.trim(0)
    wider.slot = text.slot
    for count in (4, 1):
        assert distance(wider.feed(count), wider.expected()) < FLOOR


def test_another_batch_within_a_slot_is_an_error(load: Loader) -> None:
    engine = load("decoder")
    text, wider = Text(engine), Text(engine, seed=1, batch=2)
    text.feed(6)
    wider.slot, wider.length = text.slot, 6
    with pytest.raises(EngineError, match="could not run decoder"):
        wider.feed(1)


def test_rows_with_padding_are_right_or_refused(load: Loader) -> None:
    """Rows of unlike length, padded on the left: an engine that cannot leave the padding out says so."""
    engine = load("decoder")
    text = Text(engine, batch=2)
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    inputs = {
        "inputs_embeds": text.embeds[text.ids[:, :6]],
        "attention_mask": mask,
        "position_ids": np.stack([np.arange(6), np.arange(-2, 4)]),
    }
    inputs["position_ids"] = inputs["position_ids"].clip(0)
    try:
        logits = engine.run(inputs, Slot())["logits"]
    except EngineError as error:
        assert "attention_mask has zeros" in str(error)
        return
    text.ids, text.length = text.ids[1:, 2:], 4
    assert distance(logits[1:], text.expected()) < FLOOR


def test_slots_do_not_mix(load: Loader) -> None:
    engine = load("decoder")
    texts = [Text(engine, seed) for seed in range(3)]
    for counts in ((5, 8, 2), (1, 1, 1), (1, 3, 1)):
        for text, count in zip(texts, counts, strict=True):
            assert distance(text.feed(count), text.expected()) < FLOOR


def test_without_a_slot_every_run_begins_anew(load: Loader) -> None:
    engine = load("decoder")
    text = Text(engine)
    first = text.feed(5)
    inputs = {
        "inputs_embeds": text.embeds[text.ids[:, :5]],
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.arange(5)[None],
    }
    for _ in range(2):
        assert distance(engine.run(inputs)["logits"], first) < 1e-6


def test_logits_belong_to_the_caller(load: Loader) -> None:
    text = Text(load("decoder"))
    logits = text.feed(4)
    kept = logits.copy()
    for _ in range(5):
        text.feed(1)
        gc.collect()
    np.testing.assert_array_equal(logits, kept)


def test_a_slot_is_freed_when_it_is_dropped(load: Loader) -> None:
    engine: Any = load("decoder")
    text, other = Text(engine), Text(engine, 1)
    text.feed(3)
    other.feed(3)
    gone = weakref.ref(text.slot)
    del text
    gc.collect()
    assert gone() is None and len(engine._slots) == 1
    assert distance(other.feed(1), other.expected()) < FLOOR


def test_the_cache_is_updated_in_place_by_onnxruntime(vlm_bundle: Path) -> None:
    bundle = Bundle(vlm_bundle)
    engine: Any = targets()["onnxruntime"].load(bundle.submodel("decoder"), bundle.root, Options(threads=1))
    text = Text(engine)
    text.feed(5)
    ((cache, _, _),) = engine._slots.values()
    before = {name: (value.data_ptr(), value.numpy().copy()) for name, value in cache.values.items()}
    text.feed(1)
    for name, (address, held) in before.items():
        assert cache.values[name].data_ptr() == address, "the same buffer"
        now = cache.values[name].numpy()
        np.testing.assert_array_equal(now[:, :, :5], held[:, :, :5])
        assert now[:, :, 5].any() and not held[:, :, 5].any(), "the new position was written into it"


def test_the_cache_is_fused_with_attention_by_openvino(vlm_bundle: Path) -> None:
    found = targets()["openvino"].available()
    if not found.usable:
        pytest.skip(found.reason)
    bundle = Bundle(vlm_bundle)
    engine: Any = targets()["openvino"].load(bundle.submodel("decoder"), bundle.root, Options(threads=1))
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in engine._compiled.get_runtime_model().get_ops()]
    layers = torch_model("vlm").config.text_config.num_hidden_layers
    assert kinds.count("PagedAttention") == layers and not {"Softmax", "ReadValue"} & set(kinds), sorted(set(kinds))


# Loading


def test_an_unknown_device(target: str, vlm_bundle: Path) -> None:
    bundle = Bundle(vlm_bundle)
    with pytest.raises(EngineUnavailable, match="no device 'QPU'"):
        targets()[target].load(bundle.submodel("token_embedding"), bundle.root, Options(device="QPU"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "no weights"])
def test_a_damaged_graph(target: str, vlm_bundle: Path, tmp_path: Path, damage: str) -> None:
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("vision_encoder")
    graph = tmp_path / submodel.graph
    shutil.copytree((bundle.root / submodel.graph).parent, graph.parent)
    if damage == "no weights":
        (graph.parent / "weights.safetensors").unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:2000] if damage == "truncated" else b"")
    with pytest.raises(EngineError, match="could not compile"):
        targets()[target].load(submodel, tmp_path, Options())


def test_close_may_be_called_twice(load: Loader) -> None:
    engine = load("token_embedding")
    engine.close()
    engine.close()


def test_availability_says_what_is_there(target: str) -> None:
    found = targets()[target].available()
    assert found.devices and found.version and not found.reason


def test_every_target_has_a_reason_when_it_is_not_usable() -> None:
    for name, engine in targets().items():
        found = engine.available()
        assert engine.target == name and found.usable == bool(found.devices) == (not found.reason)
