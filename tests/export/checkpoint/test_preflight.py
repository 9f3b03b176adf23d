"""What does not fit together is found before any weight is read, and named with its file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export.checkpoint.tensors
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.preflight import rehearse
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.errors import SourceError
from runtime.pipelines.diffusion import DiffusionPipeline

SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_bytes())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture
def vlm(tiny_vlm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_vlm, tmp_path / "vlm"))


@pytest.fixture
def diffusion(tiny_diffusion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_diffusion, tmp_path / "diffusion"))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may read the weights."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(export.checkpoint.tensors, "check_finite", read)


def open_source(root: Path) -> Build:
    return Build.open(Options(str(root), root.parent / "bundle"))


def refused(root: Path) -> str:
    """Why a source cannot be built."""
    with pytest.raises(SourceError) as caught:
        open_source(root)
    text = str(caught.value)
    assert "uild the bundle again" not in text and "enginecast-" not in text, text
    return text


@pytest.mark.parametrize("name", ["tiny_vlm", "tiny_diffusion", "tiny_xl"])
def test_models_that_fit_pass(name: str, request: pytest.FixtureRequest) -> None:
    assert open_source(request.getfixturevalue(name)).refused == []


def test_parts_that_the_pipeline_never_calls_are_not_built(
    tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = DiffusionPipeline.examples
    monkeypatch.setattr(DiffusionPipeline, "examples", lambda self: [next(examples(self))])
    build = open_source(tiny_diffusion)
    made = {part.name for part in build.family.parts(build.source, False)}
    assert [part.name for part in build.parts] == ["text_encoder", "unet", "vae_decoder"]
    assert made - {part.name for part in build.parts} == {"vae_encoder"}
    assert [part.name for part in build.new_parts()] == [part.name for part in build.parts]


def test_a_model_without_chat_template(vlm: Path) -> None:
    (vlm / "chat_template.jinja").unlink()
    assert f"{vlm} holds no chat template" in refused(vlm)


def test_pictures_of_another_size_than_the_tower(vlm: Path) -> None:
    edit(
        vlm / "processor_config.json",
        lambda data: data["image_processor"].update(crop_size={"height": 24, "width": 24}),
    )
    text = refused(vlm)
    assert f"{vlm / 'config.json'}: vision_encoder cannot take its input pixel_values" in text
    assert f"which {vlm / 'processor_config.json'} (crop_size) makes, as it axis 2 is 24, expected 32" in text


def test_an_image_token_that_is_no_added_token(vlm: Path) -> None:
    edit(vlm / "config.json", lambda data: data.update(image_token_index=7))
    assert f"{vlm / 'tokenizer.json'} has no added token 7" in refused(vlm)


def test_a_template_that_places_no_picture(vlm: Path) -> None:
    (vlm / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    text = refused(vlm)
    assert (
        f"{vlm / 'chat_template.jinja'}: this chat template cannot be used" in text
        and "it places 0 of 1 pictures" in text
    )


def test_a_template_without_system_messages_is_noted(vlm: Path) -> None:
    template = vlm / "chat_template.jinja"
    template.write_text(SYSTEM + template.read_text())
    (note,) = open_source(vlm).refused
    assert note.startswith("refuses a system message") and "no system messages" in note


def test_a_wrong_number_of_patches(vlm: Path) -> None:
    """A tower without class token, told to leave one out."""
    source = resolve(str(vlm))
    family = family_of(source)
    parts = family.parts(source, False)
    tower = parts[0].signature
    features = tower.outputs[0].model_copy(update={"dims": (tower.outputs[0].dims[0], 9, tower.outputs[0].dims[2])})
    object.__setattr__(parts[0], "signature", tower.model_copy(update={"outputs": (features,)}))
    with pytest.raises(
        SourceError, match=r"config\.json describes a vision_encoder whose image_features has shape .* expected \[1, 9,"
    ):
        rehearse(source, family, parts, {}, family.assets(source))


def test_a_vocabulary_larger_than_the_embedding(vlm: Path) -> None:
    edit(vlm / "config.json", lambda data: data["text_config"].update(vocab_size=100))
    text = refused(vlm)
    assert re.search(
        r"tokenizer\.json has the token '.*' with id \d+, .* below 100 \(vocab_size in its config\.json\)", text
    )
    assert str(vlm / "tokenizer.json") in text


def test_a_picture_beyond_the_context(vlm: Path) -> None:
    edit(vlm / "config.json", lambda data: data["text_config"].update(max_position_embeddings=4))
    assert "a picture takes 4 tokens, the model's context is 4" in refused(vlm)


def test_a_unet_of_another_text_encoder(diffusion: Path) -> None:
    edit(diffusion / "unet" / "config.json", lambda data: data.update(cross_attention_dim=48))
    text = refused(diffusion)
    assert str(diffusion / "unet" / "config.json") in text and "48" in text and "16" in text


def test_a_learned_token_without_embedding(diffusion: Path) -> None:
    edit(diffusion / "text_encoder" / "config.json", lambda data: data.update(vocab_size=data["vocab_size"] - 1))
    text = refused(diffusion)
    assert str(diffusion / "text_encoder" / "config.json") in text and str(diffusion / "tokenizer") in text


def test_a_part_that_cannot_be_computed(diffusion: Path) -> None:
    """A class embedding that nothing gives a class: the library's own check fails."""
    edit(diffusion / "unet" / "config.json", lambda data: data.update(num_class_embeds=10))
    text = refused(diffusion)
    assert str(diffusion / "unet" / "config.json") in text and "class" in text
