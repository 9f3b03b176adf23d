"""Engines that come one after another: who waits for which, and what becomes of them after a failure; a real model
whose text is encoded before its UNet is there.
"""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Submodel
from runtime.engine import Engine, FakeEngine, Options, targets
from runtime.errors import BundleError, EngineError, Unavailable
from runtime.pipeline import Call, Outputs, run_call, tap
from runtime.placing import loading
from runtime.placing.arriving import Arriving, coming, here, wanted
from runtime.placing.loading import LoadedModel, begin_model, load_model
from runtime.placing.placement import PlacementOptions
from runtime.tasks.image import ImageReady, ImageRequest

TARGET = "onnxruntime"
SUBMODELS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


class Closed(FakeEngine):
    def __init__(self) -> None:
        super().__init__(lambda inputs: {})
        self.closed = False

    def close(self) -> None:
        self.closed = True


def aside(work: Any) -> Future[Any]:
    """The result of work in a thread of its own."""
    future = Future[Any]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_what_is_wanted_comes_first() -> None:
    engines, notified = Arriving("abcd"), list[str]()
    assert (list(engines), len(engines), engines.coming) == (list("abcd"), 4, tuple("abcd"))
    engines.notify = lambda: notified.append(",".join(engines.here))
    waiting = aside(lambda: engines["d"])
    while engines.following() != "d":
        time.sleep(0.001)
    assert not engines.want("c") and not wanted(engines, "c") and not waiting.done()
    made = {name: Closed() for name in "abcd"}
    order = []
    while (name := engines.following()) is not None:
        order.append(name)
        engines.put(name, made[name])
    assert order == ["d", "c", "a", "b"] and waiting.result(5) is made["d"]
    assert engines.want("c") and engines.here == made and engines.coming == coming(engines) == ()
    assert notified == ["d", "c,d", "a,c,d", "a,b,c,d"]
    engines.close()
    assert engines["a"] is made["a"], "a whole model is closed by its owner"


def test_what_the_model_lacks_is_not_waited_for() -> None:
    engines = Arriving("a")
    for ask in (engines.__getitem__, engines.want, lambda name: wanted(engines, name)):
        with pytest.raises(KeyError):
            ask("e")
    assert engines.following() == "a", "it would be loaded before all others, and fail"
    engines.put("a", Closed())
    with pytest.raises(KeyError):
        engines.want("e")
    assert engines.following() is None and "e" not in engines


def test_plain_engines_are_there() -> None:
    engines = {"a": Closed()}
    assert (here(engines), coming(engines), wanted(engines, "a")) == (engines, (), True)


def test_after_a_failure_nobody_waits() -> None:
    engines = Arriving("ab")
    engines.put("a", Closed())
    waiting = aside(lambda: engines["b"])
    engines.fail(EngineError("the compiler failed"))
    engines.fail(EngineError("another"))
    with pytest.raises(EngineError, match="the compiler failed"):
        waiting.result(5)
    with pytest.raises(EngineError, match="the compiler failed"):
        engines["b"]
    assert list(engines.here) == ["a"] and engines["a"] is engines.here["a"]


def test_what_comes_after_the_end_is_freed() -> None:
    engines, late = Arriving("ab"), Closed()
    waiting = aside(lambda: engines["b"])
    assert engines.following() in ("a", "b")
    engines.close()
    for work in (lambda: waiting.result(5), lambda: engines.put("a", late), engines.following):
        with pytest.raises(Unavailable, match="was closed while it was loaded"):
            work()
    assert late.closed and engines.here == {}


class Held:
    """Holds the loading of one submodel of a real model until it is released, or makes it fail."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.released = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self.loaded: list[str] = []
        engine = targets()[TARGET]
        load = engine.load

        def held(submodel: Submodel, root: Path, options: Options) -> Engine:
            if submodel.name == name:
                self.began.set()
                assert self.released.wait(20)
                if self.failure is not None:
                    raise self.failure
            self.loaded.append(submodel.name)
            return load(submodel, root, options)

        monkeypatch.setattr(engine, "load", held)


def draw(model: LoadedModel, calls: list[str]) -> Any:
    def seen(call: Call, outputs: Outputs) -> Outputs:
        calls.append(call.submodel)
        return outputs

    items = tap(model.pipeline(ImageRequest("a red circle", steps=2, seed=1)), seen)
    item = next(items)
    try:
        while True:
            if isinstance(item, ImageReady):
                found = item.image
            item = items.send(run_call(model.engines, item) if isinstance(item, Call) else None)
    except StopIteration:
        return found


def test_a_text_is_encoded_while_the_unet_is_loaded(diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, calls = Held("unet", monkeypatch), list[str]()
    begun = begin_model(diffusion_bundle, TARGET, Options(threads=1))
    assert begun.rest is not None and held.loaded == [] and coming(begun.engines) == SUBMODELS
    resting, drawing = aside(begun.rest), aside(lambda: draw(begun, calls))
    assert held.began.wait(20)
    while not calls:
        time.sleep(0.005)
        assert not drawing.done() and not resting.done()
    assert calls == ["text_encoder"] and list(here(begun.engines)) == ["text_encoder"]
    held.released.set()
    picture, model = drawing.result(20), resting.result(20)
    assert calls[1:] == ["unet", "unet", "vae_decoder"] and held.loaded == list(SUBMODELS)
    assert list(model.places) == list(SUBMODELS) and model.rest is None and model.target == begun.target == TARGET
    assert model.device and not begun.device and tuple(begun.notes) == model.notes
    np.testing.assert_array_equal(draw(model, []), picture)
    model.close()


def test_a_submodel_that_cannot_be_loaded_ends_what_waits(
    diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held("unet", monkeypatch)
    held.failure = EngineError("the compiler failed")
    begun = begin_model(diffusion_bundle, TARGET, Options(threads=1))
    assert begun.rest is not None
    resting, drawing = aside(begun.rest), aside(lambda: draw(begun, []))
    held.released.set()
    for failed in (resting, drawing):
        with pytest.raises(EngineError, match="the compiler failed"):
            failed.result(20)
    begun.close()
    with pytest.raises(EngineError, match="the compiler failed"):
        load_model(diffusion_bundle, TARGET, Options(threads=1))


def test_a_model_is_closed_while_it_is_loaded(diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held("unet", monkeypatch)
    begun = begin_model(diffusion_bundle, TARGET, Options(threads=1))
    assert begun.rest is not None
    resting, drawing = aside(begun.rest), aside(lambda: draw(begun, []))
    assert held.began.wait(20)
    begun.close()
    with pytest.raises(Unavailable, match="was closed while it was loaded"):
        drawing.result(20)
    held.released.set()
    with pytest.raises(Unavailable, match="was closed while it was loaded"):
        resting.result(20)
    assert held.loaded == ["text_encoder", "unet"], "what comes behind it is not loaded"


def test_damage_is_found_before_a_request_begins(tmp_path: Path, tiny_bundle: Path) -> None:
    root = shutil.copytree(tiny_bundle, tmp_path / "b")
    weights = root / "onnx" / "decoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"decoder/weights.safetensors was altered"):
        begin_model(root, TARGET)


@pytest.mark.parametrize("options", [PlacementOptions(strict=True), PlacementOptions(memory_limit=1 << 32)])
def test_what_has_to_be_known_is_loaded_at_once(
    tiny_bundle: Path, options: PlacementOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = begin_model(tiny_bundle, TARGET, placing=options)
    assert model.rest is None and coming(model.engines) == ()
    model.close()
    assert loading.whole(model) is model
