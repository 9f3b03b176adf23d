"""What every target promises of several slots: calls run together equal calls run alone, a fork continues like its
original and does not disturb it, and slots that are gone hold nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calibration.observe.lean import LeanEngine
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.engine import Compiled, Engine, Options, Slot, SlotCall, targets
from runtime.errors import EngineError
from runtime.targets.onnxruntime import engine as onnxruntime
from runtime.targets.openvino import compiling
from runtime.targets.tensorrt.engine import TensorRT
from tests.runtime.targets.conftest import compiled, tokens
from tests.runtime.targets.tensorrt.conftest import Loader, fake_tensorrt, load_fake

__all__ = ["fake_tensorrt", "load_fake"]
VARIANTS = {
    "openvino, states": "openvino",
    "onnxruntime, older": "onnxruntime",
    "cuda, float16": "cuda",
    "lean": "lean",
}
"""Other forms that a target's states take, graphs of bundles built before, and the engine of calibration."""
TOGETHER = {"openvino", "onnxruntime", "onnxruntime, older", "cuda, float16"}
"""What computes several slots in one run."""
AT_ONCE = {"openvino", "onnxruntime", "cuda", "cuda, float16"}
"""What computes logits of several positions in one run."""


@pytest.fixture(params=[*targets(), *VARIANTS])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Path, Compiled]]:
    """What cases were compiled to, once for all tests, and the folders that stand for their bundles."""
    return {}


@pytest.fixture
def decoder(
    case: str,
    tiny_bundle: Path,
    made: dict[str, tuple[Path, Compiled]],
    load_fake: Loader,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """The decoder of a tiny model on the target, through its emulation or on a fake SDK where it does not run here."""
    bundle, name = Bundle(tiny_bundle), VARIANTS.get(case, case)
    submodel = bundle.submodel("decoder")
    graph = bundle.root / submodel.graph
    if case == "openvino, states":
        monkeypatch.setattr(compiling, "fits", lambda signature: False)
    if case == "onnxruntime, older":
        monkeypatch.setattr(onnxruntime, "with_logits_start", lambda model, signature: None)
    if case == "cuda, float16":
        submodel = submodel.computing("float16")
    if name == "lean":
        yield LeanEngine(submodel, ir.load(graph))
    elif issubclass(targets()[name], TensorRT):
        yield load_fake(bundle, "decoder")
    else:
        if case not in made:
            root = tmp_path_factory.mktemp("compiled")
            made[case] = root, compiled(name, submodel, graph, root)
        root, found = made[case]
        engine = targets()[name].emulate(submodel, root, Options(threads=1, compiled=found))
        yield engine
        engine.close()


class Text:
    """Embeddings that are fed to a slot, call after call."""

    def __init__(self, engine: Engine, seed: int, batch: int = 1, slot: Slot | None = None) -> None:
        self.engine, self.slot, self.length = engine, slot or Slot(), 0
        (whole,) = tokens(engine.submodel, batch, (64,), seed)
        self.embeds = whole["inputs_embeds"]

    def call(self, count: int) -> tuple[dict[str, Array], Slot]:
        start, self.length, batch = self.length, self.length + count, len(self.embeds)
        return {
            "inputs_embeds": self.embeds[:, start : self.length],
            "attention_mask": np.ones((batch, self.length), np.int64),
            "position_ids": np.tile(np.arange(start, self.length), (batch, 1)),
        }, self.slot

    def feed(self, count: int) -> Array:
        return self.engine.run(*self.call(count))["logits"]


def together(texts: Sequence[Text], counts: Sequence[int]) -> list[Array]:
    calls = [SlotCall(*text.call(count)) for text, count in zip(texts, counts, strict=True)]
    return [outputs["logits"] for outputs in texts[0].engine.run_many(calls)]


def alike(case: str, got: Array, wanted: Array) -> bool:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    floor = 2e-2 if "float16" in case or case == "coreml" else 1e-4
    return float(np.abs(got - wanted).max()) < floor * float(np.abs(wanted).max())  # type: ignore[operator]


def test_run_together_equals_run_alone(case: str, decoder: Engine) -> None:
    """Slots of unlike lengths and numbers of rows; some leave, change places and come back."""
    shapes = {0: 1, 1: 1, 2: 2, 3: 1}
    many = [Text(decoder, seed, batch) for seed, batch in shapes.items()]
    alone = [Text(decoder, seed, batch) for seed, batch in shapes.items()]
    plan = [
        {0: 5, 1: 9, 2: 2, 3: 1},
        {0: 1, 1: 1, 2: 1, 3: 1},
        {3: 1, 1: 1},
        {0: 1, 1: 3, 2: 1},
        {1: 1},
        {2: 1, 3: 1, 0: 1, 1: 1},
        {2: 1, 3: 1, 0: 1, 1: 1},
    ]
    for step in plan:
        found = together([many[index] for index in step], list(step.values()))
        for logits, (index, count) in zip(found, step.items(), strict=True):
            assert alike(case, logits, alone[index].feed(count)), (step, index)


def test_outputs_of_calls_run_together_belong_to_the_caller(decoder: Engine) -> None:
    texts = [Text(decoder, seed) for seed in range(2)]
    together(texts, (3, 4))
    first = together(texts, (1, 1))
    kept = [logits.copy() for logits in first]
    together(texts, (1, 1))
    for logits, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(logits, before)
        logits[:] = 0


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fork_continues_like_its_original_and_leaves_it_alone(case: str, decoder: Engine, batch: int) -> None:
    text = Text(decoder, 0, batch)
    text.feed(6)
    text.feed(1)
    forks = [Text(decoder, seed, batch, slot) for seed, slot in enumerate(decoder.fork(text.slot, 3), 1)]
    for fork in forks:
        fork.embeds, fork.length = np.concatenate([text.embeds[:, :7], fork.embeds[:, 7:]], 1), 7
    wanted = [Text(decoder, 9, batch) for _ in range(4)]
    for same, one in zip(wanted, (text, *forks), strict=True):
        same.embeds = one.embeds
        same.feed(7)
    for counts in ((1, 1, 1, 1), (1, 2, 1, 3), (1, 1, 1, 1)):
        found = together((text, *forks), counts)
        for logits, same, count in zip(found, wanted, counts, strict=True):
            assert alike(case, logits, same.feed(count))
    deeper = Text(decoder, 0, batch, *decoder.fork(forks[1].slot, 1))
    deeper.embeds, deeper.length = forks[1].embeds, forks[1].length
    decoder.trim(forks[1].slot, 0)
    assert alike(case, deeper.feed(2), wanted[2].feed(2)), "a fork outlives its original"


def test_a_fork_of_an_unused_slot_begins_anew(case: str, decoder: Engine) -> None:
    (slot,) = decoder.fork(Slot(), 1)
    assert alike(case, Text(decoder, 1, slot=slot).feed(3), Text(decoder, 1).feed(3))


def test_slots_that_are_gone_hold_nothing(decoder: Any) -> None:
    texts = [Text(decoder, seed) for seed in range(3)]
    together(texts, (3, 4, 5))
    together(texts, (1, 1, 1))
    forks = decoder.fork(texts[0].slot, 4)
    assert len(decoder._slots) == 7
    del texts[1:], forks
    gc.collect()
    texts[0].feed(1)
    gc.collect()
    assert len(decoder._slots) == 1
    texts.clear()
    gc.collect()
    assert not decoder._slots


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_of_several_positions(case: str, decoder: Engine, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification of guessed tokens needs the logits behind each of them, in one call."""
    text, same = Text(decoder, 0, batch), Text(decoder, 0, batch)
    text.feed(3)
    same.feed(3)
    with monkeypatch.context() as patch:
        if case in AT_ONCE:
            patch.setattr(type(decoder), "run", None)  # what the default calls for each position
        got = decoder.run_last(*text.call(5), 4)["logits"]
    wanted = np.concatenate([same.feed(count) for count in (2, 1, 1, 1)], 1)
    assert alike(case, got, wanted)
    assert alike(case, text.feed(1), same.feed(1))
    with pytest.raises(EngineError, match="outputs of 3 positions were requested"):
        decoder.run_last(*text.call(2), 3)


def test_guesses_of_several_slots_are_verified_together(case: str, decoder: Engine) -> None:
    """Slots with unlike numbers of guesses, one with none; each forgets what was not accepted, and goes on."""
    texts, wanted = ([Text(decoder, seed) for seed in range(4)] for _ in range(2))
    for text, same, count in zip((*texts, *texts), (*wanted, *wanted), (6, 3, 9, 2, 1, 1, 1, 1), strict=True):
        text.feed(count)
        same.feed(count)
    for counts, accepted in (((4, 1, 3, 2), (2, 1, 3, 1)), ((2, 3, 1, 5), (1, 3, 1, 5))):
        calls = [SlotCall(*text.call(count), count) for text, count in zip(texts, counts, strict=True)]
        found = [outputs["logits"] for outputs in decoder.run_many(calls)]
        for text, same, logits, count, kept in zip(texts, wanted, found, counts, accepted, strict=True):
            alone = np.concatenate([same.feed(1) for _ in range(kept)], 1)
            assert logits.shape[:2] == (1, count) and alike(case, logits[:, :kept], alone)
            text.length += kept - count
            decoder.trim(text.slot, text.length)
    for text, same in zip(texts, wanted, strict=True):
        assert alike(case, text.feed(1), same.feed(1))


def test_a_slot_in_two_calls_of_one_batch_is_refused(case: str, decoder: Engine) -> None:
    if case not in TOGETHER:
        pytest.skip("it runs one call after another")
    text = Text(decoder, 0)
    text.feed(2)
    with pytest.raises(EngineError, match="a slot occurs twice in one batch of calls"):
        together((text, text), (1, 1))
