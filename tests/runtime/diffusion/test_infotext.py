"""The parameters of pictures as text: written as the web UI writes them, and read back."""

from __future__ import annotations

import io
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.diffusion.defaults import ImageDefaults
from runtime.diffusion.emphasis import parse
from runtime.diffusion.hires import Hires
from runtime.diffusion.infotext import KEY, Infotext, infotext, without_tags
from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from runtime.vision.images import encode_image

PUBLISHED = """girl with an artist's beret, determined, blue eyes, (((eyeshadow)))
Negative prompt: ugly, [blurry], bad anatomy
extra limbs
Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, Model: "a, b: c"
"""
"""The example in the web UI's source, with a further line and value."""
PICTURE = np.zeros((48, 64, 3), np.uint8)


def test_the_published_example() -> None:
    read = Infotext.parse(PUBLISHED)
    assert read.prompt == "girl with an artist's beret, determined, blue eyes, (((eyeshadow)))"
    assert read.negative_prompt == "ugly, [blurry], bad anatomy\nextra limbs"
    assert read.values["Model"] == "a, b: c" and read.values["Model hash"] == "45dee52b"
    assert str(read) == PUBLISHED.strip()
    assert read.fields() == {
        "prompt": read.prompt, "negative_prompt": read.negative_prompt, "prompt_weights": True, "steps": 20,
        "sampler": "euler_ancestral", "guidance_scale": 7.5, "seed": 965400086, "width": 512, "height": 768,
    }  # fmt: skip


def test_a_picture_is_described_and_drawn_again() -> None:
    request = ImageRequest(
        "a (red) circle", "blur", steps=20, guidance_scale=7.0, sampler="dpmpp_2m_karras", loras={"soft": 0.8},
        image=PICTURE, mask=PICTURE, strength=0.5, mask_blur=4.0, seed=3, images=3,
    )  # fmt: skip
    written = infotext(request, 5, (48, 64), {"Model": "shapes"})
    assert written == (
        "a \\(red\\) circle <lora:soft:0.8>\nNegative prompt: blur\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Denoising strength: 0.5, Mask blur: 4, "
        "Seed: 5, Size: 64x48, Model: shapes"
    )
    fields = Infotext.parse(written).fields()
    assert fields.pop("prompt") == "a \\(red\\) circle" and fields.pop("prompt_weights")
    again = replace(request, images=1, **fields)
    assert again.loras == request.loras and again.seed == 5
    for field in ("negative_prompt", "steps", "guidance_scale", "sampler", "strength", "mask_blur"):
        assert getattr(again, field) == getattr(request, field)


def test_a_second_pass_and_changed_noise_are_described_and_drawn_again() -> None:
    hires = Hires(1.5, upscaler="latent_nearest_exact", steps=4, strength=0.7, prompt="b", sampler="euler_karras")
    request = ImageRequest(
        "a", steps=9, width=64, height=32, seed=5, variation_seed=8, variation_strength=0.25, noise_size=(16, 24),
        hires=hires,
    )  # fmt: skip
    written = infotext(request, 5, (48, 96))
    assert written == (
        "a\nSteps: 9, Denoising strength: 0.7, Seed: 5, Size: 64x32, Variation seed: 8, Variation seed strength: 0.25, "
        "Seed resize from: 24x16, Hires upscale: 1.5, Hires steps: 4, Hires upscaler: Latent (nearest-exact), "
        "Hires sampler: Euler, Hires schedule type: Karras, Hires prompt: b"
    )
    again = ImageRequest(**Infotext.parse(written).fields())
    for field in ("width", "height", "variation_seed", "variation_strength", "noise_size", "hires", "strength"):
        assert getattr(again, field) == getattr(request, field)


@pytest.mark.parametrize(
    ("hires", "text"),
    [
        (Hires(), "Size: 48x32, Hires upscale: 2, Hires upscaler: Latent"),
        (Hires(width=96, upscaler="lanczos"), "Seed: 1, Hires resize: 96x0, Hires upscaler: Lanczos"),
    ],
)
def test_the_size_of_the_first_pass_follows_from_the_scale(hires: Hires, text: str) -> None:
    written = infotext(ImageRequest("a", steps=9, hires=hires), 1, (64, 96))
    assert written.endswith(text)
    fields = Infotext.parse(written + ", Model: m").fields()
    assert fields["hires"] in (hires, Hires(scale=2.0))


@pytest.mark.parametrize(
    ("first", "multiple", "scale", "size"),
    [
        ((512, 768), 8, 1.5, "Size: 768x512"),
        ((512, 512), 8, 1.3, ""),  # 664, which is 511 times 1.3
        ((536, 536), 8, 1.25, ""),
        ((48, 48), 16, 1.2, ""),  # 48 again, which is 40 times 1.2
        ((520, 504), 8, 3.0, "Size: 504x520"),
    ],
)
def test_a_size_that_does_not_follow_is_left_out(
    first: tuple[int, int], multiple: int, scale: float, size: str
) -> None:
    hires = Hires(scale)
    drawn, _ = hires.sizes(first, multiple)
    assert (f", {size}, Hires" if size else "Seed: 1, Hires") in infotext(ImageRequest("a", hires=hires), 1, drawn)


def test_prompts_of_a_second_pass_are_read_without_weights() -> None:
    request = ImageRequest("a (b)", hires=Hires(2.0, prompt="c [d]", negative_prompt="(e:2)"))
    text = infotext(request, 1, (64, 64))
    assert r"Hires prompt: c \[d\], " in text
    read = Infotext.parse(text).fields()["hires"]
    assert (read.prompt, read.negative_prompt) == (r"c \[d\]", r"\(e:2\)")
    assert [(piece.text, piece.weight) for piece in parse(read.negative_prompt)] == [("(e:2)", 1.0)]
    weighted = infotext(replace(request, prompt_weights=True), 1, (64, 64))
    assert Infotext.parse(weighted).fields()["hires"] == request.hires


def test_work_that_a_picture_did_without_is_recalled() -> None:
    request = ImageRequest("a", steps=9, guidance_start=0.0, guidance_end=0.75, forecast="1,2,4-9")
    written = infotext(request, 5, (8, 8))
    assert written == 'a\nSteps: 9, Guidance start: 0, Guidance end: 0.75, Forecast: "1,2,4-9", Seed: 5, Size: 8x8'
    again = ImageRequest(**Infotext.parse(written).fields())
    assert (again.guided, again.forecast) == (request.guided, request.forecast)


def test_prompts_with_weights_stay() -> None:
    request = ImageRequest("(a:1.2) [b]", prompt_weights=True, steps=2)
    assert infotext(request, 5, (8, 8), prompt="(a:1.2) [b] <lora:x>").startswith("(a:1.2) [b] <lora:x>\nSteps: 2,")


def test_what_a_request_leaves_to_the_model() -> None:
    request, defaults = ImageRequest("a", eta=0.5), ImageDefaults(steps=9, guidance_scale=2, sampler="lcm")
    assert infotext(request, 1, (8, 8)) == "a\nEta: 0.5, Seed: 1, Size: 8x8"
    assert infotext(request, 1, (8, 8), defaults=defaults) == (
        "a\nSteps: 9, Sampler: LCM, Schedule type: Automatic, CFG scale: 2, Eta: 0.5, Seed: 1, Size: 8x8"
    )
    text = infotext(ImageRequest("a", image=PICTURE, guidance_scale=1), 1, (8, 8), {"X": "1,2"}, defaults)
    assert text.endswith('CFG scale: 1, Denoising strength: 0.8, Seed: 1, Size: 8x8, X: "1,2"')


def test_a_file_has_its_text_in_any_script() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    for text in ("plain", "círculo 赤い"):
        with Image.open(io.BytesIO(encode_image(picture, texts={KEY: text}))) as file:
            assert file.info[KEY] == text


def test_what_is_no_infotext_is_a_prompt() -> None:
    assert Infotext.parse("a circle: red, Steps: 3") == Infotext("a circle: red, Steps: 3")
    assert Infotext.parse("") == Infotext("")


def test_tags() -> None:
    assert without_tags("a <lora:soft:0.5>circle <lora:x>") == ("a circle", {"soft": 0.5, "x": 1.0})
    assert without_tags("a <b> < c") == ("a <b> < c", {})


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<hypernet:x:1>", "<hypernet:x:1> is not known here"),
        ("<lora:x:1:2>", "<lora:x:1:2> is not known here"),
        ("<lora:x:y>", "has no number as its scale"),
        ("<lora:x:nan>", "is nan, expected -100 to 100"),
        ("<lora:x:1000>", "expected -100 to 100"),
        ("<lora:x:1><lora:x:2>", "has the LoRA 'x' twice"),
    ],
)
def test_tags_that_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=r"^prompt: ") as raised:
        without_tags(prompt)
    assert words in str(raised.value)


@pytest.mark.parametrize("value", ["Steps: many, Seed: 1, Size: 2x2", "Steps: 1, Seed: 1, Size: 2 by 2"])
def test_values_that_are_refused(value: str) -> None:
    with pytest.raises(InvalidInput, match=r"^infotext: has "):
        Infotext.parse(f"a\n{value}").fields()


def test_a_length_of_5000_digits_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^infotext: has .* as Seed resize from, expected a size"):
        Infotext.parse(f"a\nSteps: 1, Seed: 1, Size: 2x2, Seed resize from: {'9' * 5000}x1").fields()


@given(st.text(max_size=200))
def test_every_text_can_be_read(text: str) -> None:
    Infotext.parse(text)


@pytest.mark.parametrize(
    "line", ["a " * 500_000, 'a:"' * 300_000, "a:," * 300_000, "<a:" * 300_000, 'aa:"' + "\\" * 900_000]
)
def test_hostile_lines_take_no_time(line: str) -> None:
    began = process_time()
    Infotext.parse(f"a\n{line}")
    assert process_time() - began < 5


LINE = st.text(st.characters(exclude_categories=["Cc", "Zl", "Zp", "Zs", "Cs"]), max_size=30)


@given(LINE.filter(lambda text: not text.startswith("Negative prompt:")), LINE, LINE)
def test_what_is_written_is_read(prompt: str, negative: str, model: str) -> None:
    values = {"Steps": "20", "Seed": "1", "Size": "8x8"} | ({"Model": model} if model.strip('"') == model else {})
    values = {name: value for name, value in values.items() if value}
    written = Infotext(prompt, negative, values)
    assert Infotext.parse(str(written)) == written


def test_half_a_surrogate_pair_stays_as_it_is_written() -> None:
    found = Infotext.parse('a\nSteps: 1, Seed: 2, Model: "\\ud800", Hires prompt: "a, b"')
    assert found.values["Model"] == '"\\ud800"' and found.values["Hires prompt"] == "a, b"
