"""Sizes in a config.json that no weights of the checkpoint can have: refused from the numbers, before a library is
imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.checkpoint.source import resolve
from runtime.errors import SourceError

SAMPLES = Path(__file__).parents[3] / "samples"
WRONG: list[object] = [10**9, 10**12, -1, 0, 64.0, "64", True, [64], {}, 10**400]


def changed(sample: str, folder: Path, file: str, place: tuple[str, ...], value: object) -> Path:
    """A checkpoint of the sample's files, as links, with another number in a config file."""
    shutil.copytree(SAMPLES / sample, folder, copy_function=os.symlink)
    config = part = json.loads((folder / file).read_bytes())
    (folder / file).unlink()
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (folder / file).write_text(json.dumps(config))
    return folder


TEXT = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "head_dim",
)
PLACES = [
    *(("shapes-vlm", "config.json", ("text_config", name)) for name in TEXT),
    *(
        ("shapes-vlm", "config.json", ("vision_config", name))
        for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
    ),
    ("shapes-diffusion", "text_encoder/config.json", ("num_hidden_layers",)),
    ("shapes-diffusion", "text_encoder/config.json", ("vocab_size",)),
    ("shapes-diffusion", "unet/config.json", ("in_channels",)),
    ("shapes-diffusion", "unet/config.json", ("norm_num_groups",)),
    ("shapes-diffusion", "vae/config.json", ("latent_channels",)),
]


@pytest.mark.parametrize(
    ("sample", "file", "place"), PLACES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else value
)
def test_numbers_that_cannot_be(sample: str, file: str, place: tuple[str, ...], tmp_path: Path) -> None:
    folder = changed(sample, tmp_path / "c", file, place, "?")
    text = (folder / file).read_text()
    for value in WRONG:
        (folder / file).write_text(text.replace('"?"', json.dumps(value)))
        with pytest.raises(
            SourceError, match=rf"config\.json: {'.'.join(place)} is .*, expected .*\. Take the config\.json"
        ) as caught:
            resolve(str(folder))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("unet/config.json", "block_out_channels", [10**9, 64]),
        ("unet/config.json", "block_out_channels", []),
        ("unet/config.json", "block_out_channels", [64] * 10_000),
        ("unet/config.json", "layers_per_block", 10**6),
        ("unet/config.json", "layers_per_block", [1, 10**6]),
        ("unet/config.json", "attention_head_dim", [8, "8"]),
        ("unet/config.json", "transformer_layers_per_block", [[1, 10**6], 1]),
        ("unet/config.json", "cross_attention_dim", [10**9]),
        ("unet/config.json", "sample_size", 10**9),
        ("vae/config.json", "block_out_channels", [64, None]),
    ],
)
def test_lists_of_numbers_that_cannot_be(file: str, name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"config\.json: {name} is .*, expected"):
        resolve(str(changed("shapes-diffusion", tmp_path / "c", file, (name,), value)))


def test_each_may_be_small_and_all_too_many(tmp_path: Path) -> None:
    folder = changed("shapes-vlm", tmp_path / "c", "config.json", ("text_config", "intermediate_size"), 60_000)
    with pytest.raises(
        SourceError,
        match=r"text_config\.num_hidden_layers, hidden_size and intermediate_size imply [\d,]+ weights or more",
    ):
        resolve(str(folder))
    folder = changed("shapes-vlm", tmp_path / "d", "config.json", ("vision_config", "image_size"), 65_000)
    with pytest.raises(
        SourceError, match=r"vision_config\.image_size 65000 has [\d,]+ patches of \d+, expected at most 65,536"
    ):
        resolve(str(folder))


def test_nothing_is_imported_for_it(tmp_path: Path) -> None:
    folder = changed("shapes-vlm", tmp_path / "c", "config.json", ("text_config", "num_hidden_layers"), 10**6)
    program = (
        "import sys\nfrom serving.cli.commands import main\n"
        f"sys.argv = ['enginecast', 'build', {str(folder)!r}]\n"
        "try: main()\nfinally: print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (4, "[]\n"), ended.stderr
    assert "num_hidden_layers is 1000000, expected 1 to" in ended.stderr
    assert not any(path.name == "bundles" for path in tmp_path.iterdir())


@pytest.mark.parametrize("sample", ["shapes-vlm", "shapes-diffusion"])
def test_what_was_published_is_plausible(sample: str) -> None:
    resolve(f"sample:{sample}")


def test_weights_that_cannot_be_read_are_told_by_who_opens_them(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "shapes-vlm", tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    assert resolve(str(tmp_path / "c")).layout == "transformers"
