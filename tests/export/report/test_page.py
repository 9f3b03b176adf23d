"""The page of a bundle's quality: whole, self-contained, and unable to run what a bundle's author wrote into it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint.tensors import read_header
from export.report.page import _is_parameter, report, sizes
from export.report.pictures import GAIN, difference
from export.report.quality import (
    QUALITY,
    OutputQuality,
    Quality,
    SubmodelQuality,
    TaskQuality,
    save_quality,
)
from export.report.speed import WHOLE, Speed, Timed, Timing
from export.task import FOLDER
from export.tasks.chat import AnswerQuality
from export.tasks.image import PictureQuality
from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.errors import BundleError, InvalidInput, NotFound, ResourceExhausted
from runtime.timing import Spread
from runtime.vision.images import decode_image

HOSTILE = "<script>alert('x')</script><img src=\"https://example.org/x.png\" onerror=alert(1)>{{ 7 * 191 }}"
VOID = {"meta", "img", "br"}
Make = Callable[..., Bundle]


class Page(HTMLParser):
    """What a page consists of. Fails on tags that are closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def images(self) -> list[np.ndarray[Any, Any]]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [
            decode_image(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))
            for source in sources
        ]


def submodel(name: str, snr: float) -> SubmodelQuality:
    output = OutputQuality(name="out", snr_db=snr, psnr_db=snr + 10, cosine=0.999)
    return SubmodelQuality(name=name, precision="int4", reference_precision="float16", calls=3, outputs=(output,))


def timed(target: str, quant: str, median: float) -> Timed:
    return Timed(target=target, quant=quant, device=f"{target}:CPU", spread=Spread.of([median / 2, median, median * 2]))


def speed(*targets: str, others: float | None = 0.02) -> Speed:
    """PyTorch takes 0.3 s for a prompt and 30 ms for a token, the float engines half of that, quantized a third of
    theirs.
    """
    times = [
        (
            timed("torch", "none", whole),
            *(timed(name, quant, whole / part) for name in targets for quant, part in (("none", 2), ("int4", 6))),
        )
        for whole in (0.3, 0.03)
    ]
    return Speed(
        cpu="a processor",
        threads=2,
        others=others,
        versions={"torch": "9.9"},
        timings=(
            Timing(submodel="decoder", what="prompt of 60 tokens", tokens=60, calls=1, times=times[0]),
            Timing(submodel="decoder", what="next token", tokens=1, calls=50, times=times[1]),
            Timing(submodel="vae_encoder", what="1x3x8x8", tokens=0, calls=0, times=times[1]),
            Timing(submodel=WHOLE, what="answer, 51 tokens", tokens=0, calls=1, times=times[0]),
        ),
        left_out=("tensorrt: it has no GPU here",),
    )


PICTURE = PictureQuality(
    prompt="a red tram", seed=5, latents_snr_db=22.25, psnr_db=31.5, ssim=0.9125, gmsd=0.0625,
    reference=f"{FOLDER}/a.png",
    quantized=f"{FOLDER}/b.png",
)  # fmt: skip
ANSWER = AnswerQuality(
    question="what is this?", picture=f"{FOLDER}/c.png", reference="a tram", quantized="a bus", tokens=4,
    token_agreement=0.5,
    next_token_agreement=0.75, kl_divergence=0.125, reference_perplexity=1.5, quantized_perplexity=2.5,
)  # fmt: skip
QUALITY_OF = Quality(
    quant="int4", reference_quant="none", target="onnxruntime", reference_target="onnxruntime", device="CPU",
    submodels=(submodel("decoder", 25.5), submodel("weak", 7.5)),
    results={"pictures": (PICTURE,), "answers": (ANSWER,)},
    task=TaskQuality(task="held-out questions answered right", cases=20, reference_right=19, quantized_right=17),
)  # fmt: skip


@pytest.fixture
def make(tiny_bundle: Path, tmp_path: Path) -> Make:
    """A bundle with a quality report, both changed as asked: what else stands in the manifest is not the point here."""

    def bundle(quality: Quality = QUALITY_OF, **changes: Any) -> Bundle:
        root = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, root, ignore=shutil.ignore_patterns("*.safetensors"))
        (root / MANIFEST).write_text(json.dumps({**json.loads((tiny_bundle / MANIFEST).read_bytes()), **changes}))
        pictures = {
            f"{FOLDER}/{name}.png": np.full((16, 16, 3), level, np.uint8)
            for name, level in (("a", 100), ("b", 110), ("c", 50))
        }
        save_quality(root, quality, pictures)
        return Bundle(root)

    return bundle


def written(bundle: Bundle, tmp_path: Path) -> Page:
    output = tmp_path / "pages" / "report.html"
    report(bundle, output)
    assert list(output.parent.iterdir()) == [output], "nothing unfinished is left"
    return Page(output.read_text(encoding="utf-8"))


def test_everything_is_shown(make: Make, tmp_path: Path) -> None:
    page = written(make(quant="int4"), tmp_path)
    assert re.match(r".*tiny-vlm int4 .*LlavaForConditionalGeneration from .*without quantization", page.words)
    for shown in (
        "2 below their floors",
        "SNR of weak.out is 7.5 dB, expected at least 12 dB at int4",
        "agreement on the next token is 0.75, expected at least 0.85 at int4",
        "22.2 dB SNR of the final latents, median of 1 picture",
        "17 / 20 held-out questions answered right; 19 without quantization",
        "a red tram Without quantization int4 Difference \u00d7 8 PSNR 31.5 dB SSIM 0.9125 SNR of",
        "SNR of the final latents 22.2 dB GMSD 0.0625 Seed 5",
        "what is this? a tram a bus differs 50 % 75 % 0.1250 1.500 → 2.500",
        "2.5000 at int4: a change of +66.67 %. 50.0 % of the answers' tokens are the same.",
        "decoder.out int4 3 25.5 35.5 0.99900 held",
        "weak.out int4 3 7.5 17.5 0.99900 below",
        "Noise in the UNet that left 11 dB",
        "LPIPS Not measured",
        "Not timed when this bundle was built. enginecast report DIR --speed SOURCE",
        "onnxruntime on CPU",
    ):
        assert shown in page.words
    for one in Bundle(tmp_path / "bundle").manifest.submodels:
        assert one.parity is not None and f"{one.name} full {one.parity.tensor} {one.parity.error:.1e}" in page.words
    assert f"torch {json.loads((tmp_path / 'bundle' / MANIFEST).read_bytes())['versions']['torch']}" in page.words


def plain(page: Page) -> str:
    """The words with letters and hyphens for signs that look like them."""
    return page.words.replace("\u00d7", "x").replace("\u2013", "-")


def test_speed_is_shown(make: Make, tmp_path: Path) -> None:
    page = written(make(QUALITY_OF.model_copy(update={"speed": speed("onnxruntime", "openvino")})), tmp_path)
    for shown in (
        "5.00 ms decoder, next token on onnxruntime; 3.00 x as fast as not quantized, 6.00 x PyTorch",
        "carried out by each in turns: 3 times",
        "On a processor, 2 threads; other programs had 2 % of the processors' time",
        "decoder prompt of 60 tokens , 1 x a request PyTorch float32 300 ms 225 ms - 450 ms 200",
        "onnxruntime not quantized 150 ms 112 ms - 225 ms 400 2.00 x",
        "openvino int4 50.0 ms 37.5 ms - 75.0 ms 1200 6.00 x 3.00 x",
        "vae_encoder 1x3x8x8 , not in this request",
        "request answer, 51 tokens PyTorch",
        "Left out: tensorrt: it has no GPU here",
        "With torch 9.9; on torch:CPU, onnxruntime:CPU, openvino:CPU",
    ):
        assert shown in plain(page)
    assert "busy" not in page.words and "Not timed" not in page.words
    widths = [attributes["width"] for tag, attributes in page.tags if tag == "rect"]
    assert widths[:3] == ["100.00", "50.00", "16.67"] and len(widths) == 4 * 5


def test_speed_measured_anew_is_shown_instead(make: Make, tmp_path: Path) -> None:
    bundle = make(QUALITY_OF.model_copy(update={"speed": speed("onnxruntime")}))
    report(bundle, tmp_path / "report.html", speed("openvino", others=0.5))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (
        "6.00 x PyTorch, on a busy machine" in plain(page)
        and "the machine was busy Time it again when it is idle" in page.words
    )
    assert "openvino int4" in page.words and "onnxruntime int4" not in page.words


def test_speed_without_torch_or_quantized(make: Make, tmp_path: Path) -> None:
    timing = Timing(submodel="unet", what="2x4x8x8", tokens=0, calls=4, times=(timed("openvino", "none", 0.25),))
    alone = speed("openvino", others=None).model_copy(update={"timings": (timing,), "left_out": ()})
    page = written(make(QUALITY_OF.model_copy(update={"speed": alone})), tmp_path)
    assert "openvino not quantized 250 ms 188 ms - 375 ms With" in plain(page)
    assert "Tokens/s" not in page.words and "other programs" not in page.words


def test_sizes(tiny_bundle: Path, tiny_vlm: Path, make: Make, tmp_path: Path) -> None:
    """Of a bundle without quantization: as many parameters as the checkpoint has, less the vision layer that LLaVA does
    not use.
    """
    found = {size.name: size for size in sizes(Bundle(tiny_bundle))}
    stored = {name: prod(ref.shape) for name, ref in read_header(tiny_vlm / "model.safetensors")[1].items()}
    embedding = next(count for name, count in stored.items() if name.endswith("embed_tokens.weight"))
    assert found["token_embedding"].parameters == embedding and 16 <= found["token_embedding"].bits < 17
    assert 0.6 * sum(stored.values()) < sum(size.parameters for size in found.values()) <= sum(stored.values())
    page = written(make(), tmp_path)
    size, total = found["decoder"], sum(size.parameters for size in found.values())
    assert (
        f"decoder {size.precision} {size.parameters:,} {4e-6 * size.parameters:.2f} MB {2e-6 * size.parameters:.2f} MB"
        in page.words
    )
    assert f"all {total:,} {4e-6 * total:.2f} MB" in page.words


def test_scales_are_no_parameters() -> None:
    """A weight with three scales: as it is, cast, and one that is a factor elsewhere too."""
    weight, scale, half, both = (
        ir.Value(
            name=name,
            const_value=ir.tensor(np.ones(shape, dtype), name=name),
            shape=ir.Shape(shape),
            type=ir.TensorType(code),
        )
        for name, shape, dtype, code in (
            ("w", (2, 3), np.int8, ir.DataType.INT8),
            ("s", (3,), np.float32, ir.DataType.FLOAT),
            ("h", (3,), np.float16, ir.DataType.FLOAT16),
            ("b", (3,), np.float32, ir.DataType.FLOAT),
        )
    )
    cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
    users = [ir.node("DequantizeLinear", [weight, factor]) for factor in (scale, cast.outputs[0], both)]
    users.append(ir.node("Mul", [both, both]))
    assert [_is_parameter(value) for value in (weight, scale, half, both)] == [True, False, False, True]


def test_nothing_is_loaded_from_elsewhere(make: Make, tmp_path: Path) -> None:
    page = written(make(), tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "a", "form", "base"}
    )
    values = [(name, value) for _, attributes in page.tags for name, value in attributes.items()]
    assert all(
        value.startswith("data:image/png;base64,") for name, value in values if name in ("src", "href", "srcset")
    )
    assert not any(name.startswith("on") or name == "style" for name, _ in values)
    text = (tmp_path / "pages" / "report.html").read_text()
    assert "://" not in text and "url(" not in text and "@import" not in text
    policy = next(
        attributes for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_pictures_are_those_of_the_bundle(make: Make, tmp_path: Path) -> None:
    page = written(make(), tmp_path)
    assert [int(image.mean()) for image in page.images] == [50, 100, 110, 10 * GAIN]


def test_difference_is_capped_and_has_no_sign() -> None:
    one, other = np.zeros((1, 1, 3), np.uint8), np.array([[[0, 3, 255]]], np.uint8)
    assert difference(one, other).tolist() == difference(other, one).tolist() == [[[0, 3 * GAIN, 255]]]


def hostile_speed() -> Speed:
    one = speed("onnxruntime")
    times = tuple(time.model_copy(update={"target": HOSTILE, "device": HOSTILE}) for time in one.timings[0].times)
    timing = one.timings[0].model_copy(update={"submodel": HOSTILE, "what": HOSTILE, "times": times})
    return one.model_copy(
        update={"cpu": HOSTILE, "left_out": (HOSTILE,), "versions": {HOSTILE: HOSTILE}, "timings": (timing,)}
    )


def test_hostile_names_are_text(make: Make, tmp_path: Path, tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_bytes())
    source = {**manifest["source"], "name": HOSTILE, "architecture": HOSTILE}
    quality = QUALITY_OF.model_copy(
        update={
            "submodels": (submodel(HOSTILE, 3),),
            "results": {
                "pictures": (PICTURE.model_copy(update={"prompt": HOSTILE}),),
                "answers": (
                    ANSWER.model_copy(update={"question": HOSTILE, "reference": HOSTILE, "quantized": f"{HOSTILE}!"}),
                ),
            },
            "device": HOSTILE,
            "speed": hostile_speed(),
        }
    )
    page = written(make(quality, name=HOSTILE, source=source, versions={HOSTILE: HOSTILE}), tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and all("onerror" not in attributes for _, attributes in page.tags)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    assert page.words.count(" ".join(HOSTILE.split())) >= 10
    assert "1337" not in page.words, "no template is made of what a bundle holds"


def test_without_pictures_answers_or_floors(make: Make, tmp_path: Path) -> None:
    plain = QUALITY_OF.model_copy(update={"quant": "none", "results": {}, "task": None})
    page = written(make(plain), tmp_path)
    assert "no floors are set for none" in page.words and not page.images
    for absent in ("Pictures", "Answers", "Floors at", "LPIPS", "Perplexity"):
        assert absent not in page.words


def test_held_floors(make: Make, tmp_path: Path) -> None:
    fine = QUALITY_OF.model_copy(update={"submodels": (submodel("decoder", 300),), "results": {"pictures": (PICTURE,)}})
    page = written(make(fine), tmp_path)
    assert "every floor is held" in page.words and "below" not in page.words
    assert "decoder.out int4 3 equal equal 0.99900 held" in page.words


def test_what_was_not_measured(make: Make, tmp_path: Path) -> None:
    absent = submodel("vae_encoder", 0).model_copy(update={"calls": 0, "outputs": ()})
    page = written(
        make(QUALITY_OF.model_copy(update={"submodels": (absent,), "results": {"pictures": (PICTURE,)}})), tmp_path
    )
    assert "1 below its floor" in page.words
    assert "vae_encoder int4 0 not measured" in page.words


def test_a_bundle_of_an_older_version(make: Make) -> None:
    bundle = make()
    manifest = json.loads((bundle.root / MANIFEST).read_bytes())
    (bundle.root / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 0}))
    with pytest.raises(BundleError, match="has schema version 0, this program reads 1 to 3: build the bundle again"):
        report(Bundle(bundle.root), bundle.root / "report.html")


def test_mistakes(make: Make, tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(NotFound, match="no quality report"):
        report(Bundle(tiny_bundle), tmp_path / "report.html")
    bundle = make()
    with pytest.raises(InvalidInput, match="is a folder"):
        report(bundle, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceExhausted, match="cannot write"):
        report(bundle, tmp_path / "file" / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file"]


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("quality/a.png", None, "is missing"),
        ("quality/a.png", b"<svg onload='alert(1)'/>", "cannot be shown"),
        (QUALITY, b"{", "cannot be read"),
        (QUALITY, b'{"quant": "int4"}', "reference_quant: Field required"),
        (QUALITY, b"\xff\xfe", "damaged, or another version of this program wrote it"),
        ("onnx/decoder/model.onnx", None, "model.onnx cannot be read"),
        ("onnx/decoder/model.onnx", b"no graph", "model.onnx cannot be read"),
    ],
)
def test_damaged(make: Make, tmp_path: Path, path: str, data: bytes | None, message: str) -> None:
    bundle = make()
    (bundle.root / path).unlink()
    if data is not None:
        (bundle.root / path).write_bytes(data)
    with pytest.raises(BundleError, match=message):
        report(bundle, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("figure", "number"), [("quantized_perplexity", 0), ("kl_divergence", float("nan")), ("tokens", 0)]
)
def test_figures_that_are_none(make: Make, tmp_path: Path, figure: str, number: float) -> None:
    bundle = make()
    data = json.loads((bundle.root / QUALITY).read_bytes())
    data["results"]["answers"][0][figure] = number
    (bundle.root / QUALITY).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=figure):
        report(bundle, tmp_path / "report.html")


def test_pictures_of_different_sizes(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="differ in size"):
        changed = PICTURE.model_copy(update={"quantized": f"{FOLDER}/d.png"})
        bundle = make(QUALITY_OF.model_copy(update={"results": {"pictures": (changed,)}}))
        save_quality(
            bundle.root,
            QUALITY_OF.model_copy(update={"results": {"pictures": (changed,)}}),
            {f"{FOLDER}/d.png": np.zeros((8, 8, 3), np.uint8)},
        )
        report(bundle, tmp_path / "report.html")
