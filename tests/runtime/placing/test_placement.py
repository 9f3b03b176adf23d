"""Which submodel goes where: on made-up targets, and machines with more and less memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, Manifest, Source, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Signature
from runtime.engine import Availability, Engine, FakeEngine
from runtime.errors import EngineUnavailable, InvalidInput, NotFound, ResourceExhausted
from runtime.placing import memory, placement
from runtime.placing.containers import Allowance
from runtime.placing.devices import Device, Machine
from runtime.placing.placement import Place, Placement, PlacementOptions, caches, parse_place, place
from tests.runtime.bundle.test_signature import DECODER

MB = 10**6
SIZES = {"text_encoder": 100 * MB, "unet": 800 * MB, "vae_decoder": 50 * MB}


def usable(name: str, *devices: str, reason: str = "") -> type[Engine]:
    class Usable(FakeEngine):
        target = name

        @classmethod
        def available(cls) -> Availability:
            return Availability(not reason, devices, reason)

    return Usable


TARGETS = {
    "tensorrt": usable("tensorrt", "cuda:0 (NVIDIA L4, 8.9)", "cuda:1 (NVIDIA T4, 7.5)"),
    "openvino": usable("openvino", "CPU (AMD EPYC)", "GPU.0 (Intel Arc)"),
    "onnxruntime": usable("onnxruntime", "CPUExecutionProvider"),
    "coreml": usable("coreml", reason="this is no Mac"),
}
CUDA0, CUDA1 = Place("tensorrt", "cuda:0", "cuda:0"), Place("tensorrt", "cuda:1", "cuda:1")
HETERO = Place("openvino", "HETERO:GPU.0,CPU", "gpu:0")
CPU, ARC, ORT = (
    Place("openvino", "CPU", "cpu"),
    Place("openvino", "GPU.0", "gpu:0"),
    Place("onnxruntime", "CPUExecutionProvider", "cpu"),
)


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(name: str) -> type[Engine]:
        if name not in TARGETS:
            raise NotFound(f"target '{name}' is not known")
        return TARGETS[name]

    monkeypatch.setattr(placement, "targets", lambda: TARGETS)
    monkeypatch.setattr(placement, "target", target)
    monkeypatch.setattr(memory, "OVERHEAD", 0)


def machine(**free: int | None) -> Machine:
    """With so many MB free in each memory, by our devices' names with "_" for ":"."""
    gpus = (("cuda:0", "cuda"), ("cuda:1", "cuda"), ("gpu:0", "intel-gpu"))
    amounts = {
        name: None if (some := free.get(name.replace(":", "_"), 10_000)) is None else some * MB
        for name in ("cpu", "cuda:0", "cuda:1", "gpu:0")
    }
    kinds: Any = dict(gpus)
    others = tuple(Device(name, kinds[name], f"model of {name}", None, amounts[name]) for name in kinds)
    return Machine((Device("cpu", "cpu", "AMD EPYC", None, amounts["cpu"]), *others), Allowance(4))


def bundle(
    folder: Path,
    targets: tuple[str, ...] = ("tensorrt", "openvino", "onnxruntime", "coreml"),
    sizes: Mapping[str, int] = SIZES,
    decoder: str = "",
) -> Bundle:
    submodels = tuple(
        Submodel(
            name=name,
            signature=DECODER if name == decoder else Signature(inputs=(), outputs=()),
            graph=f"onnx/{name}/model.onnx",
            precision=Precision.parse("int8"),
            nbytes=size,
        )
        for name, size in sizes.items()
    )
    manifest = Manifest(
        name="b", key="", pipeline="diffusion", task="image",
        quant="int8", submodels=submodels, config={}, versions={}, files={},
        artifacts=tuple(Artifact(target=name, submodel=one) for name in targets for one in sizes),
        source=Source(name="s", family="f", architecture="A", fingerprint=""),
    )  # fmt: skip
    root = folder / "b"
    root.mkdir(exist_ok=True)
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(root)


def first(plan: Placement) -> dict[str, Place]:
    return {name: choice.places[0] for name, choice in plan.choices.items()}


def placed(folder: Path, where: Machine, target: str | None = None, device: str = "", **placing: Any) -> Placement:
    return place(bundle(folder), target, device, PlacementOptions(**{"rows": (), **placing}), where)


# The requested placement


def test_all_on_the_best_target_where_there_is_room(tmp_path: Path) -> None:
    plan = placed(tmp_path, machine())
    assert set(first(plan).values()) == {CUDA0} and not plan.notes and not plan.rooms
    assert plan.choices["unet"].places == (CUDA0, CUDA1, CPU, ARC, ORT), (
        "where it cannot be loaded there, the next is tried"
    )


@pytest.mark.parametrize(
    ("target", "device", "expected"),
    [
        ("openvino", "", CPU), ("openvino", "GPU.0", ARC), (None, "cuda:1", CUDA1), (None, "cuda", CUDA0), (None, "cpu",
            CPU),
        ("openvino", "gpu", ARC), ("onnxruntime", "CPU", ORT), ("openvino", "hetero:gpu.0,cpu", HETERO),
        (None, "AUTO", Place("openvino", "AUTO", "cpu")),
    ],
)  # fmt: skip
def test_a_target_and_a_device(tmp_path: Path, target: str | None, device: str, expected: Place) -> None:
    assert set(first(placed(tmp_path, machine(), target, device)).values()) == {expected}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text_encoder=cpu,denoiser=cuda", {"text_encoder": CPU, "unet": CUDA0, "vae_decoder": CUDA0}),
        ("unet=openvino:GPU.0", {"text_encoder": CUDA0, "unet": ARC, "vae_decoder": CUDA0}),
        ("vae=onnxruntime,unet=tensorrt:cuda:1", {"text_encoder": CUDA0, "unet": CUDA1, "vae_decoder": ORT}),
        ("unet=HETERO:GPU.0,CPU,vae=cpu", {"text_encoder": CUDA0, "unet": HETERO, "vae_decoder": CPU}),
        ("denoiser=cpu,unet=cuda:1", {"text_encoder": CUDA0, "unet": CUDA1, "vae_decoder": CUDA0}),
    ],
)  # fmt: skip
def test_submodels_in_places_of_their_own(tmp_path: Path, text: str, expected: dict[str, Place]) -> None:
    assert first(placed(tmp_path, machine(), place=parse_place(text))) == expected


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("unett=cpu", InvalidInput, r"place: has the submodel 'unett', which the bundle lacks: did you mean 'unet'\?"),
        ("decoder=cpu", InvalidInput, "known: denoiser, text_encoder, unet, vae, vae_decoder"),
        ("unet=cuda:7", InvalidInput,
            r"puts unet on 'cuda:7', which is no target or device here: did you mean 'cuda:1'\?.*no Mac"),
        ("unet=openvin", InvalidInput, "did you mean 'openvino'"),
        ("unet=coreml", EngineUnavailable, "coreml: this is no Mac"),
        ("unet=openvino:NPU", EngineUnavailable, "openvino: has no device 'NPU' here, it found CPU"),
        ("unet=HETERO:NPU,CPU", EngineUnavailable, "has no device 'HETERO:NPU,CPU'"),
    ],
)  # fmt: skip
def test_impossible_places(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        placed(tmp_path, machine(), place=parse_place(text))


def test_a_target_that_the_bundle_lacks(tmp_path: Path) -> None:
    small = bundle(tmp_path, ("onnxruntime",))
    with pytest.raises(
        EngineUnavailable, match="was built for onnxruntime, not for openvino: build it with --target openvino"
    ):
        place(small, None, "", PlacementOptions({"unet": "openvino"}, rows=()), machine())
    with pytest.raises(EngineUnavailable, match="has no device 'cuda:0' here"):
        place(small, None, "cuda:0", PlacementOptions(rows=()), machine())


@pytest.mark.parametrize("text", ["", "unet", "=cpu", "unet=", ",unet=cpu", "unet=cpu,unet=cuda", "unet=cpu,"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^place: has "):
        parse_place(text)


names = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)


@given(
    st.dictionaries(
        names,
        st.lists(st.text(alphabet="abcGPU.:019", min_size=1, max_size=8), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_places_are_read_as_they_are_written(places: dict[str, list[str]]) -> None:
    text = ",".join(f"{name}={','.join(where)}" for name, where in places.items())
    assert parse_place(text) == {name: ",".join(where) for name, where in places.items()}


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert all(name and where for name, where in parse_place(text).items())
    except InvalidInput as error:
        assert error.field == "place"


# Memory


def test_what_does_not_fit_goes_to_the_next_device(tmp_path: Path) -> None:
    """int8 weights take what they are on a device of its own: 850 MB leave no room for the text encoder."""
    plan = placed(tmp_path, machine(cuda_0=880, cuda_1=60))
    assert first(plan) == {"text_encoder": CPU, "unet": CUDA0, "vae_decoder": CUDA0}
    (note,) = plan.notes
    assert (
        "text_encoder is on openvino:CPU: tensorrt:cuda:0 has 76.3 MiB left" in note
        or "text_encoder is on openvino:CPU" in note
    )
    assert not plan.rooms


def test_where_no_memory_is_left_they_take_turns(tmp_path: Path) -> None:
    plan = placed(tmp_path, machine(cpu=1700), "openvino", "CPU")
    assert plan.rooms == {"cpu": 1700 * MB} and "take turns in 1.6 GiB of cpu" in plan.notes[-1]


def test_a_limit_holds_for_every_memory(tmp_path: Path) -> None:
    plan = placed(tmp_path, machine(), memory_limit=900 * MB)
    assert plan.rooms["cuda:0"] == 900 * MB == plan.rooms["cuda:1"]


def test_too_little_memory_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted) as caught:
        placed(tmp_path, machine(), memory_limit=500 * MB)
    for reason in (
        "no device has enough memory for unet",
        "tensorrt:cuda:0: needs 763 MiB, has 477 MiB",
        "onnxruntime:CPUExecutionProvider: needs 1.5 GiB",
    ):
        assert reason in str(caught.value)


def test_memory_that_nobody_tells_is_enough(tmp_path: Path) -> None:
    assert set(first(placed(tmp_path, machine(cuda_0=None))).values()) == {CUDA0}


def test_places_to_avoid_are_taken_only_where_there_is_no_other(tmp_path: Path) -> None:
    built = bundle(tmp_path)
    assert set(first(place(built, None, "", PlacementOptions(rows=()), machine(), [CUDA0])).values()) == {CUDA1}
    assert set(first(place(built, "openvino", "CPU", PlacementOptions(rows=()), machine(), [CPU])).values()) == {CPU}


# Measured figures


def row(**changes: Any) -> str:
    """A row of the bundle here; `median` is its figure."""
    median = changes.pop("median", 2.0)
    row = {
        "metric": "picture", "unit": "s", "program": "enginecast 0.1.0", "threads": 4, "versions": {},
        "spread": {"repetitions": 1} | dict.fromkeys(("minimum", "lower", "median", "upper", "maximum"), median),
        "bundle": "b",
        "source": "s",
        "quant": "int8",
        "cpu": "AMD EPYC",
        "date": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    return json.dumps(row | {"target": "openvino", "device": "openvino:CPU (AMD EPYC)"} | changes)


def test_measured_targets_change_places_among_themselves(tmp_path: Path) -> None:
    """A GPU that was never measured stays first, since its rank says so; of the two that were measured the faster one
    is next.
    """
    rows = tmp_path / "rows.jsonl"
    lines = [
        row(),
        row(target="onnxruntime", median=1.0),
        row(target="onnxruntime", median=9.0, date="2026-01-01T00:00:00Z"),
    ]
    rows.write_text("\n".join([*lines, "no row", "[1]", row(spread={}), row(median=0)]))
    plan = placed(tmp_path, machine(), rows=(rows,))
    assert plan.choices["unet"].places == (CUDA0, CUDA1, ORT, CPU, ARC)
    (note,) = plan.notes
    assert re.fullmatch(rf"rows {rows}: line 4 is no row \(.+\), nor are 2 other lines; they decide nothing: .+", note)


@pytest.mark.parametrize(
    "other",
    [
        {"quant": "none"},
        {"cpu": "Other"},
        {"bundle": "c"},
        {"metric": "load"},
        {"device": "tensorrt:cuda:0 (NVIDIA H100)"},
    ],
)
def test_figures_of_others_do_not_count(tmp_path: Path, other: dict[str, Any]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row()}\n{row(target='onnxruntime', **({'median': 1.0} | other))}\n")
    assert placed(tmp_path, machine(), rows=(rows, tmp_path / "missing")).choices["unet"].places[2:] == (CPU, ARC, ORT)


def test_chat_models_are_compared_by_an_answer(tmp_path: Path) -> None:
    """1 s to the first token and 64 at 64 a second beat 0.5 s and 64 at 32 a second."""
    rows = tmp_path / "rows.jsonl"
    figures = {"openvino": (0.5, 32.0), "onnxruntime": (1.0, 64.0)}
    lines = [
        row(target=t, metric=m, median=v)
        for t, pair in figures.items()
        for m, v in zip(("first_token", "decode"), pair, strict=True)
    ]
    rows.write_text("\n".join(lines))
    assert placed(tmp_path, machine(), rows=(rows,)).choices["unet"].places[2:] == (ORT, CPU, ARC)


# What is held for further requests


def test_caches_are_where_their_owners_are(tmp_path: Path) -> None:
    """Features are in the host's memory, conversations in that of the decoder."""
    placing = PlacementOptions(rows=(), picture_cache=3 * MB, prefix_cache=70 * MB)
    drawing, chatting = bundle(tmp_path), bundle(tmp_path, decoder="unet")
    assert caches(drawing, None, "", placing, machine()) == {"cpu": 3 * MB}
    assert caches(chatting, None, "", placing, machine()) == {"cpu": 3 * MB, "cuda:0": 70 * MB}
    assert caches(chatting, "onnxruntime", "", placing, machine()) == {"cpu": 73 * MB}
    limited = PlacementOptions(rows=(), picture_cache=3 * MB, prefix_cache=70 * MB, memory_limit=500 * MB)
    assert caches(chatting, None, "", limited, machine()) == {"cpu": 3 * MB}
    assert caches(chatting, None, "", PlacementOptions(rows=()), machine()) == {}
