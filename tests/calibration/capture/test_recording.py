"""What is kept of a request: every noise level alike, and the calls of a slot as one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.capture.recording import Quota, Recorder, count_positions
from runtime.bundle.signature import BATCH, Array, Dim, Port, Signature, State, Tensor
from runtime.engine import FakeEngine, Slot
from runtime.errors import InvalidInput
from runtime.pipeline import Call, Pipeline, Progress, drive

X = Signature(inputs=(Tensor(name="x", dtype="float32", dims=(BATCH,)),), outputs=())
NEW, PAST = Dim(name="sequence", min=1, opt=1, max=64), Dim(name="past", min=0, opt=1, max=64)
ALL = Dim(name="total", min=1, opt=2, max=64, sum_of=("past", "sequence"))
DECODER = Signature(
    inputs=(
        Tensor(name="embeds", dtype="float32", dims=(BATCH, NEW, 3)),
        Tensor(name="mask", dtype="int64", dims=(BATCH, ALL)),
        Tensor(name="positions", dtype="int64", dims=(BATCH, NEW)),
    ),
    outputs=(Tensor(name="logits", dtype="float32", dims=(BATCH, 1, 5)),),
    port=Port(embeddings="embeds", mask="mask", positions="positions"),
    states=(
        State(
            past=Tensor(name="past.key", dtype="float16", dims=(BATCH, 2, PAST, 4)),
            present=Tensor(name="present.key", dtype="float16", dims=(BATCH, 2, ALL, 4)),
            axis=2,
        ),
    ),
)


@given(
    limit=st.integers(1, 60),
    requests=st.integers(1, 40),
    calls=st.integers(1, 30),
    seed=st.integers(0, 5),
    name=st.sampled_from(["unet", "vae"]),
)
def test_every_position_is_kept_as_often(limit: int, requests: int, calls: int, seed: int, name: str) -> None:
    quota = Quota(limit, requests, seed)
    kept = [quota.positions(name, request, calls) for request in range(requests)]
    assert kept == [quota.positions(name, request, calls) for request in range(requests)]
    assert all(one == sorted(set(one)) and set(one) <= set(range(calls)) for one in kept)
    counts = Counter(place for one in kept for place in one)
    assert sum(counts.values()) <= limit
    if limit <= requests * calls and all(len(one) < calls for one in kept):
        assert sum(counts.values()) == limit
        assert max(counts[place] for place in range(calls)) - min(counts[place] for place in range(calls)) <= 1


def test_the_usual_capture_covers_all_steps_twice() -> None:
    quota = Quota(limit=24, requests=8, seed=0)
    kept = [quota.positions("unet", request, 12) for request in range(8)]
    assert Counter(place for one in kept for place in one) == dict.fromkeys(range(12), 2)
    assert {len(one) for one in kept} == {3}
    assert kept != [Quota(24, 8, seed=1).positions("unet", request, 12) for request in range(8)]
    assert quota.positions("unet", 0, 0) == []


def test_positions_are_counted() -> None:
    assert count_positions([0, 2], 4) == [1, 0, 1, 0]
    assert count_positions([], 0) == []


def test_copies_are_recorded_and_events_passed_on() -> None:
    def pipeline() -> Pipeline:
        x = np.zeros(1, np.float32)
        for step in range(3):
            outputs = yield Call("unet", {"x": x})
            assert outputs is not None
            x += outputs["y"]  # in place, as pipelines may: what was recorded must not change
            yield Progress(step + 1, 3)

    recorder = Recorder({"unet": X, "other": X})
    engine = FakeEngine(lambda inputs: {"y": np.ones(1, np.float32)})
    assert len(list(drive(recorder.watch(pipeline()), {"unet": engine}))) == 3
    assert [float(call["x"][0]) for call in recorder.calls()["unet"]] == [0, 1, 2]
    assert recorder.calls()["other"] == []


def test_submodels_that_were_not_named_are_left_out() -> None:
    recorder = Recorder({"unet": X})
    recorder.offer(Call("unknown", {}))
    assert recorder.calls() == {"unet": []}


def test_closing_reaches_the_pipeline() -> None:
    closed = []

    def pipeline() -> Pipeline:
        try:
            yield Progress(0, 1)
            yield Progress(1, 1)
        finally:
            closed.append(True)

    driven = drive(Recorder({}).watch(pipeline()), {})
    next(driven)
    driven.close()
    assert closed == [True]


def decode(start: int, length: int, slot: Slot | None, keep: int | None = None) -> Call:
    """Positions `start` to `start` + `length`, each with embeddings that tell which it is."""
    positions = np.arange(start, start + length)
    embeds = np.repeat(positions[None, :, None], 3, axis=2).astype(np.float32)
    return Call(
        "decoder",
        {"embeds": embeds, "mask": np.ones((1, start + length), np.int64), "positions": positions[None]},
        slot,
        keep,
    )


def recorded(*calls: Call) -> list[dict[str, Array]]:
    recorder = Recorder({"decoder": DECODER})
    for call in calls:
        recorder.offer(call)
    return recorder.calls()["decoder"]


def check(call: dict[str, Array], positions: list[int]) -> None:
    assert call.keys() == {tensor.name for tensor in DECODER.graph_inputs}
    assert call["positions"].tolist() == [positions] and call["embeds"][0, :, 0].tolist() == positions
    assert call["mask"].shape == (1, len(positions))
    assert call["past.key"].shape == (1, 2, 0, 4) and call["past.key"].dtype == np.float16


def test_the_calls_of_a_slot_become_one_from_an_empty_cache() -> None:
    one, other = Slot(), Slot()
    first, second = recorded(decode(0, 5, one), decode(0, 2, other), decode(5, 1, one), decode(6, 1, one))
    check(first, list(range(7)))
    check(second, [0, 1])


def test_calls_without_a_slot_stay_alone() -> None:
    first, second = recorded(decode(0, 3, None), decode(0, 2, None))
    check(first, [0, 1, 2])
    check(second, [0, 1])


def test_what_a_slot_forgot_is_left_out() -> None:
    slot = Slot()
    (call,) = recorded(decode(0, 5, slot), decode(5, 1, slot), decode(3, 4, slot, keep=3))
    check(call, list(range(7)))
    (anew,) = recorded(decode(0, 5, slot), decode(0, 2, slot, keep=0))
    check(anew, [0, 1])


def test_a_slot_that_was_used_before_is_left_out() -> None:
    assert recorded(decode(5, 1, Slot())) == []


def test_what_does_not_fit_the_signature_is_refused() -> None:
    with pytest.raises(InvalidInput, match="embeds: is missing"):
        recorded(Call("decoder", {}, Slot()))
