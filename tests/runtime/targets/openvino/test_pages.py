"""Caches in pages: rows of unlike length and with padding, growth, and the same numbers as caches that are states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.engine import Options, Slot, targets
from runtime.errors import EngineError
from runtime.targets.openvino import compiling
from runtime.targets.openvino.pages import FIRST_CAPACITY, LAST, fits, has_pages

FLOOR = 1e-4


@pytest.fixture
def decoder(vlm_bundle: Path) -> Any:
    return load(vlm_bundle)


def load(root: Path) -> Any:
    found = targets()["openvino"].available()
    if not found.usable:
        pytest.skip(found.reason)
    bundle = Bundle(root)
    return targets()["openvino"].load(bundle.submodel("decoder"), bundle.root, Options(threads=1))


def embeddings(engine: Any, rows: int, length: int) -> Array:
    hidden = engine.submodel.signature.inputs[0].dims[-1]
    return np.random.default_rng(0).standard_normal((rows, length, hidden)).astype(np.float32)


def call(embeds: Array, mask: Array) -> dict[str, Array]:
    """The inputs of a call whose positions are the last of `mask` [batch, total]; padding stands at position 0."""
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clip(0)[:, -embeds.shape[1] :],
    }


def run(engine: Any, embeds: Array, lengths: Sequence[int]) -> list[Array]:
    """The logits of calls of these lengths, one behind the other."""
    slot, start, found = Slot(), 0, []
    for length in lengths:
        stop = start + length
        mask = np.ones((len(embeds), stop), np.int64)
        found.append(engine.run(call(embeds[:, start:stop], mask), slot)["logits"])
        start = stop
    return found


def distance(got: Array, wanted: Array) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())  # type: ignore[operator]


@pytest.mark.parametrize("rows", [1, 3])
def test_pages_give_what_states_give(vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    lengths = (7, 1, 4, FIRST_CAPACITY, 1)
    paged = load(vlm_bundle)
    monkeypatch.setattr(compiling, "fits", lambda signature: False)
    states = load(vlm_bundle)
    assert has_pages(paged._compiled) and not has_pages(states._compiled)
    embeds = embeddings(paged, rows, sum(lengths))
    for got, wanted in zip(run(paged, embeds, lengths), run(states, embeds, lengths), strict=True):
        assert distance(got, wanted) < FLOOR


def test_attention_over_pages_has_no_guard_against_hidden_rows(decoder: Any) -> None:
    nodes = decoder._compiled.get_runtime_model().get_ops()
    layers = [node.get_rt_info()["originalLayersNames"].astype(str) for node in nodes]
    assert any("PagedAttention" in layer for layer in layers) and not any("IsNaN" in layer for layer in layers)


def test_the_end_is_computed_for_those_positions_alone_whose_outputs_are_given(decoder: Any) -> None:
    behind, products = {LAST}, []
    for node in decoder._compiled.get_runtime_model().get_ordered_ops():
        if any(source.get_node().get_friendly_name() in behind for source in node.input_values()):
            behind.add(node.get_friendly_name())
            if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul"):
                products.append(node.get_rt_info()["originalLayersNames"].astype(str))
    assert len(products) == 5, products
    assert ".o_proj" in products[0] and ".down_proj" in products[-2] and "logits" in products[-1]


def test_states_can_be_trimmed(vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "fits", lambda signature: False)
    engine, slot = load(vlm_bundle), Slot()
    embeds = embeddings(engine, 1, 9)
    engine.run(call(embeds, np.ones((1, 9), np.int64)), slot)
    engine.trim(slot, 4)
    again = engine.run(call(embeds[:, 4:6], np.ones((1, 6), np.int64)), slot)["logits"]
    assert distance(again, run(engine, embeds, (6,))[0]) < FLOOR


def test_padding_is_left_out_wherever_it_is(decoder: Any) -> None:
    mask = np.ones((3, 8), np.int64)
    mask[1, :3] = 0
    mask[2, [1, 4, 5]] = 0
    embeds, slot = embeddings(decoder, 3, 10), Slot()
    first = decoder.run(call(embeds[:, :8], mask), slot)["logits"]
    longer = np.concatenate([mask, np.ones((3, 2), np.int64)], 1)
    second = decoder.run(call(embeds[:, 8:], longer), slot)["logits"]
    for row in range(3):
        kept = embeds[row : row + 1, longer[row] != 0]
        alone = run(decoder, kept, (int(mask[row].sum()), 2))
        assert distance(first[row : row + 1], alone[0]) < FLOOR
        assert distance(second[row : row + 1], alone[1]) < FLOOR


def test_a_row_of_padding_alone_is_refused(decoder: Any) -> None:
    mask = np.ones((2, 4), np.int64)
    mask[1] = 0
    with pytest.raises(EngineError, match="a row without any position"):
        decoder.run(call(embeddings(decoder, 2, 4), mask), Slot())


def test_models_without_states_have_no_pages(vlm_bundle: Path) -> None:
    found = {submodel.name: fits(submodel.signature) for submodel in Bundle(vlm_bundle).manifest.submodels}
    assert found == {"vision_encoder": False, "token_embedding": False, "decoder": True}


def text(engine: Any, slot: Slot, start: int, stop: int) -> None:
    engine.run(call(embeddings(engine, 1, stop)[:, start:], np.ones((1, stop), np.int64)), slot)


def test_forks_share_pages_until_they_write(decoder: Any) -> None:
    slot, pages = Slot(), decoder._pages
    size = pages.positions
    text(decoder, slot, 0, 2 * size + 3)
    assert sorted(pages.users, reverse=True)[:4] == [1, 1, 1, 0]
    forks = decoder.fork(slot, 3)
    assert sum(users > 0 for users in pages.users) == 3, "a fork takes no memory"
    text(decoder, forks[0], 2 * size + 3, 2 * size + 4)
    assert sorted(users for users in pages.users if users) == [1, 3, 4, 4], "only the page that is written is copied"
    decoder.trim(forks[0], 0)
    del forks
    assert sorted(users for users in pages.users if users) == [1, 1, 1]


def test_memory_follows_what_slots_hold(decoder: Any) -> None:
    pages, least = decoder._pages, FIRST_CAPACITY // decoder._pages.positions
    slots = [Slot() for _ in range(4)]
    for slot in slots:
        text(decoder, slot, 0, FIRST_CAPACITY)
    assert len(pages.users) == 4 * least
    del slots[1:], slot
    assert len(pages.users) == 2 * least, "compacted around what is left"
    text(decoder, slots[0], FIRST_CAPACITY, FIRST_CAPACITY + 1)
    slots.clear()
    assert not pages.users and not pages._memory


def test_a_slot_that_holds_less_than_the_mask_says_is_refused(decoder: Any) -> None:
    with pytest.raises(EngineError, match="attention_mask has 40 positions before this call, its slot holds 0 at most"):
        text(decoder, Slot(), 40, 41)
