"""What people do on the page, in Chromium without a window, with a fake server behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.diffusion.infotext import KEY
from runtime.vision.images import encode_image
from tests.fakes.serving import until
from tests.serving.page.conftest import CAN, Opened, Served

TEXT = "a small blue square\nNegative prompt: blurry\nSteps: 9, Sampler: Euler, CFG scale: 3, Seed: 12, Size: 128x64"

EDITOR = """empty => {
    const text = document.querySelector('#draw-canvas')?.innerText ?? ''
    return text.includes('%') && text.includes('Upload an image') == empty
}"""
"""Whether the editor of the first picture is there, and empty or not."""


PICTURES = """([part, count]) =>
    new Set([...document.querySelectorAll(part + ' img')].map(image => image.src)).size == count
"""
"""Whether there are so many pictures in a part of the page."""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG file with parameters in it."""
    file = tmp_path / "drawn.png"
    file.write_bytes(encode_image(np.full((64, 128, 3), (200, 30, 30), np.uint8), texts={KEY: TEXT}))
    return file


def value(page: Any, part: str) -> str:
    """What is filled in."""
    return str(page.input_value(f"{part} :is(textarea, input)"))


def test_a_picture_is_drawn_and_stopped_and_all_stays_on_this_machine(opened: Opened, served: Served) -> None:
    page, model = opened.page, served.fake.draw
    opened.says("#draw-width", "64 to 512")
    model.hold()
    page.fill("#draw-prompt textarea", "a red circle")
    page.fill("#draw-seed :is(textarea, input)", "7")
    page.click("#draw-start")
    opened.until(lambda: served.fake.busy() == 1)
    model.let(2)
    opened.says("#draw-status", "step 2 of 6")
    opened.seen("#draw-preview")
    page.click("#draw-stop")
    opened.says("#draw-status", "stopped")
    model.release()
    opened.until(lambda: served.fake.busy() == 0)
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    opened.seen("#draw-results")
    assert (served.seen[-1].prompt, served.seen[-1].seed, served.seen[-1].steps) == ("a red circle", 7, 6)
    opened.tab("Gallery")
    page.locator("#album-pictures .thumbnail-item").first.click()
    opened.page.wait_for_function("() => document.querySelector('#album-text textarea').value.includes('Seed: 7')")
    for name, shown in (("Talk", "#talk-model"), ("Models", "#models-table"), ("Profiles", "#profiles-plot")):
        opened.tab(name)
        page.wait_for_selector(shown)
    opened.seen("#draw-results")
    opened.tab("Draw")
    page.fill("#draw-width :is(textarea, input)", "wide")
    page.click("#draw-start")
    opened.says("#draw-status", "width: is 'wide', expected a whole number")
    assert page.locator("#draw-status [role=alert]").count() == 1
    assert opened.elsewhere == []
    assert opened.faults == []


@pytest.mark.full
def test_a_grid_is_drawn_stopped_and_goes_on(opened: Opened, served: Served) -> None:
    page, model, before = opened.page, served.fake.draw, len(served.seen)
    opened.says("#draw-width", "64 to 512")
    page.fill("#draw-prompt textarea", "a red circle")
    page.get_by_role("button", name="Grid (X/Y/Z)").click()
    opened.chosen("#draw-x-field", "steps")
    page.fill("#draw-x-values :is(textarea, input)", "1,2")
    opened.chosen("#draw-y-field", "prompt_sr")
    page.fill("#draw-y-values :is(textarea, input)", "red,blue")
    model.hold()
    page.click("#draw-start")
    opened.until(lambda: len(served.seen) == before + 1)
    model.let(1)
    opened.says("#draw-status", "cell 2 of 4")
    opened.seen("#draw-results")  # while the second one is drawn
    page.click("#draw-stop")
    opened.says("#draw-status", "stopped")
    model.release()
    opened.until(lambda: served.fake.busy() == 0)
    page.click("#draw-start")
    opened.says("#draw-status", "a grid of 4 cells")
    page.wait_for_function(PICTURES, arg=["#draw-results", 5])
    drawn = [(one.prompt, one.steps) for one in served.seen[before:]]
    second = ("a red circle", 2)
    assert drawn == [("a red circle", 1), second, second, ("a blue circle", 1), ("a blue circle", 2)]
    opened.tab("Gallery")
    page.wait_for_function(PICTURES, arg=["#album-pictures", 5])
    assert opened.faults == []


@pytest.mark.full
def test_a_script_is_chosen_and_its_settings_are_filled_in(opened: Opened, served: Served) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    page.fill("#draw-prompt textarea", "a red circle")
    page.get_by_role("button", name="Scripts").click()
    opened.chosen("#draw-scripts-chosen", "xyz_grid")
    opened.says("#draw-scripts-settings", "xyz_grid:x")
    opened.typed("#draw-scripts-settings", 0, 1, "steps=1,2")
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    assert served.seen[-1].scripts == {"xyz_grid": {"x": "steps=1,2"}}


@pytest.mark.full
def test_a_picture_is_seen_larger_and_moved(opened: Opened, served: Served) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    opened.seen("#draw-results")
    page.locator("#draw-results").get_by_label("Zoom").click()
    said = page.locator("#viewer output")
    page.wait_for_function("() => document.querySelector('#viewer output').innerText == '7500 %'")  # 16 to 1200 pixels
    page.locator("#viewer").get_by_text("1:1").click()
    assert said.inner_text() == "100 %"
    page.keyboard.press("+")
    assert said.inner_text() == "125 %"
    before = page.locator("#viewer img").bounding_box()
    page.mouse.move(600, 450)
    page.mouse.down()
    page.mouse.move(640, 430)
    page.mouse.up()
    after = page.locator("#viewer img").bounding_box()
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (40, -20)
    page.mouse.wheel(0, -400)
    page.wait_for_function("() => parseInt(document.querySelector('#viewer output').innerText) > 180")
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert opened.faults == []


@pytest.mark.full
def test_conditions_are_those_of_the_model(opened: Opened, served: Served) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    page.get_by_role("button", name="Sizes and scores").click()
    page.fill("#draw-original_size :is(textarea, input)", "512,768")
    assert not page.locator("#draw-aesthetic_score").is_visible()
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    assert served.seen[-1].original_size == (512, 768)


@pytest.mark.full
def test_several_answers_and_how_likely_their_tokens_were(opened: Opened, served: Served) -> None:
    page = opened.page
    opened.tab("Talk")
    page.get_by_role("button", name="More").click()
    for name, text in (("answers", "2"), ("temperature", "1"), ("logprobs", "1")):
        page.fill(f"#talk-{name} :is(textarea, input)", text)
    page.fill("#talk-question textarea", "what is it?")
    page.keyboard.press("Enter")
    opened.says("#talk-status", "2 answers, 24 characters in")
    opened.says("#talk-chat", "Answer 2")
    opened.says("#talk-likely", "50.0%")
    assert (served.asked[-1].answers, served.asked[-1].temperature, served.asked[-1].logprobs) == (2, 1, 1)
    page.fill("#talk-answers :is(textarea, input)", "many")
    page.fill("#talk-question textarea", "and now?")
    page.keyboard.press("Enter")
    opened.says("#talk-status", "answers: is 'many', expected a whole number")


@pytest.mark.full
def test_talking_about_a_picture(opened: Opened, served: Served, picture: Path) -> None:
    page = opened.page
    opened.tab("Talk")
    page.wait_for_selector("#talk-question textarea")
    page.locator("#talk-question input[type=file]").first.set_input_files(picture)
    opened.seen("#talk-question")
    page.fill("#talk-question textarea", "what is it?")
    page.keyboard.press("Enter")
    opened.says("#talk-status", "12 characters in")
    opened.says("#talk-chat", "a red círcle")
    opened.seen("#talk-chat")
    page.wait_for_selector("#talk-stop:disabled")
    (asked,) = served.asked[-1].messages
    assert [type(part).__name__ for part in asked.content] == ["PictureFile", "str"]
    page.fill("#talk-question textarea", "and now?")
    page.keyboard.press("Enter")
    opened.until(lambda: len(served.asked[-1].messages) == 3)
    assert [message.role for message in served.asked[-1].messages] == ["user", "assistant", "user"]
    opened.says("#talk-status", "12 characters in")
    page.click("#talk-new")
    opened.says("#talk-chat", "Drop a picture")


@pytest.mark.full
def test_parameters_are_recalled_from_a_file(opened: Opened, served: Served, picture: Path) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    opened.tab("Gallery")
    page.locator("#album-pictures input[type=file]").first.set_input_files(picture)
    page.wait_for_function("() => document.querySelector('#album-text textarea').value.includes('blue square')")
    page.click("#album-begin")
    page.wait_for_function(EDITOR, arg=False)
    opened.tab("Gallery")
    page.click("#album-draw")
    page.wait_for_function("() => document.querySelector('#draw-prompt textarea').value == 'a small blue square'")
    assert [value(page, f"#draw-{name}") for name in ("width", "height", "seed")] == ["128", "64", "12"]
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    drawn = served.seen[-1]
    assert (drawn.steps, drawn.sampler, drawn.guidance_scale, drawn.negative_prompt) == (9, "euler", 3, "blurry")
    assert drawn.image.size == (128, 64)


@pytest.mark.full
def test_only_what_a_model_has_is_shown(opened: Opened, served: Served) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    for title in ("First picture", "LoRA files", "Style pictures", "Controls"):
        assert page.get_by_role("button", name=title).is_visible(), title
    served.backend.can = CAN | {"image": False, "styles": [], "controls": [], "loras": []}
    try:
        page.reload()
        opened.says("#draw-width", "64 to 512")
        page.wait_for_function(
            "() => ![...document.querySelectorAll('button')].some(one => one.innerText == 'Controls')"
        )
        for title in ("First picture", "LoRA files", "Style pictures", "Controls"):
            assert not page.get_by_role("button", name=title).is_visible(), title
    finally:
        served.backend.can = dict(CAN)


@pytest.mark.full
def test_a_mask_is_painted_on_a_picture(opened: Opened, served: Served, picture: Path) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    page.get_by_role("button", name="First picture").click()
    page.wait_for_function(EDITOR, arg=True)
    page.locator("#draw-canvas input[type=file]").first.set_input_files(picture)
    page.wait_for_function(EDITOR, arg=False)
    page.locator("#draw-canvas button[aria-label=Brush]").click()
    page.wait_for_timeout(500)
    box = page.locator("#draw-canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    drawn = served.seen[-1]
    assert drawn.image.size == (128, 64)
    mask = np.asarray(drawn.mask)[..., 0]
    assert mask.shape == (64, 128)
    assert mask[32, 64] == 255
    assert (mask[0] == 0).all()


@pytest.mark.full
# Gradio leaves the file of a picture open
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_a_control_a_style_and_a_lora_arrive(opened: Opened, served: Served, picture: Path) -> None:
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    for title, kind in (("Style pictures", "styles"), ("Controls", "controls")):
        page.get_by_role("button", name=title).click()
        page.locator(f"#draw-{kind}-0-picture input[type=file]").first.set_input_files(picture)
        opened.seen(f"#draw-{kind}-0-picture")
        page.fill(f"#draw-{kind}-0-scale input", "0.4")
    page.fill("#draw-controls-0-end input", "0.5")
    page.get_by_role("button", name="LoRA files").click()
    opened.says("#draw-loras", "pixel")
    opened.typed("#draw-loras", 0, 1, "0.7")
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    drawn = served.seen[-1]
    (control,), (style,) = drawn.controls, drawn.styles
    assert (control.name, control.scale, control.start, control.end) == ("canny", 0.4, 0, 0.5)
    assert (style.name, style.scale) == ("photo", 0.4)
    assert control.image.size == style.image.size == (128, 64)
    assert drawn.loras == {"pixel": 0.7}
    assert opened.faults == []


@pytest.mark.full
def test_models_are_unloaded_and_loaded(opened: Opened, served: Served) -> None:
    opened.tab("Models")
    opened.says("#models-table", "ready")
    opened.page.wait_for_function("() => document.querySelector('#models-model input').value == 'draw'")
    opened.page.click("#models-unload")
    opened.until(lambda: served.fake.host.status("draw").state.value == "unloaded")
    opened.says("#models-table", "unloaded")
    opened.page.click("#models-load")
    opened.until(lambda: served.fake.host.status("draw").state.value == "ready")


@pytest.mark.full
def test_leaving_the_page_stops_its_requests(opened: Opened, served: Served) -> None:
    page, model = opened.page, served.fake.draw
    opened.says("#draw-width", "64 to 512")
    model.hold()
    page.click("#draw-start")
    opened.until(lambda: served.fake.busy() == 1)
    model.let(1)
    opened.says("#draw-status", "step 1 of 6")
    opened.close()
    until(served.fake.leaving, 20)
    model.release()
    until(lambda: served.fake.busy() == 0)


@pytest.mark.full
def test_light_dark_and_narrow(chromium: Any, served: Served) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        opened = Opened(chromium, served.url, viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page = opened.page
        opened.says("#draw-width", "64 to 512")
        assert page.evaluate("() => document.body.classList.contains('dark')") is dark
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        opened.tab("Models")
        opened.says("#models-table", "ready")
        page.click("#turn")
        assert page.evaluate("() => document.body.classList.contains('dark')") is not dark
        opened.close()
