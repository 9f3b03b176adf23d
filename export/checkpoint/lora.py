"""LoRA files: low-rank changes of a model's layers (Hu et al. 2021, arXiv:2106.09685), read as byte ranges.

Three layouts are read: that of diffusers with PEFT (`unet.<layer>.lora_A.weight`), the older ones of diffusers
(`<layer>.lora.down.weight`, `<attention>.processor.to_q_lora.down.weight`) and that of kohya
(`lora_unet_<layer>.lora_down.weight` beside `.alpha`), whose layers have the names of diffusers or, of SDXL, those of
the original code. The layers themselves are found in the library's model, whose own names decide.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.keys import listing
from export.checkpoint.tensors import TensorRef, read_header
from runtime.bundle.manifest import sha256
from runtime.errors import SourceError, UnsupportedModel
from runtime.files import other_content

if TYPE_CHECKING:
    from torch import nn

ROLES: Final[Mapping[str, re.Pattern[str]]] = {
    "down": re.compile(r"(\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    "up": re.compile(r"(\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
"""What a tensor of a layer is, by the end of its name."""

KINDS: Final[Mapping[str, re.Pattern[str]]] = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoCon with a Tucker decomposition": re.compile(r"\.lora_mid\.|\.hada_t"),
    "OFT": re.compile(r"\.(oft_|boft_)"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "IA3": re.compile(r"\.on_input$|\.ia3_"),
    "a difference of whole weights": re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"),
    "LoRA of embeddings": re.compile(r"\.lora_embedding_"),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\.bias$"),
    "PEFT's own, whose alpha is in adapter_config.json": re.compile(r"^base_model\.model\."),
}
"""Kinds of adapters that are not read, by names of their tensors."""

KOHYA: Final = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2"}  # fmt: skip
"""The component of a layer by the beginning of its name."""

OLDER: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Names of a text encoder's attention in older files of diffusers."""

METADATA: Final = "lora_adapter_metadata"
"""Key of a safetensors file's metadata under which diffusers writes the configuration of PEFT, by component."""


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight: `factor` times `up` [outputs, rank] times `down` [rank, inputs]. Of a convolution
    `up` is [outputs, rank, 1, 1] and `down` [rank, inputs, height, width].
    """

    up: TensorRef
    down: TensorRef
    factor: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def matrices(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`up` [outputs, rank] with the factor in it, and `down` [rank, inputs (times height and width)]."""
        up, down = (ref.array().astype(np.float32).reshape(ref.shape[0], -1) for ref in (self.up, self.down))
        return up * np.float32(self.factor), down

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the product has this shape of a weight [outputs, inputs, ...]."""
        ones = (1,) * (len(shape) - 2)
        return self.up.shape == (shape[0], self.rank, *ones) and self.down.shape == (self.rank, *shape[1:])

    def delta(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The product, in the shape of its weight."""
        up, down = self.matrices()
        return (up @ down).reshape(shape)


@dataclass(frozen=True)
class Lora:
    """A file: its layers by the names that it has for them, and its sha256."""

    path: Path
    layers: Mapping[str, LowRank]
    tensors: Mapping[str, TensorRef]
    sha256: str

    def matched(self, models: Mapping[str, nn.Module], made: str) -> dict[str, dict[str, LowRank]]:
        """What is added to each weight, by component and name in the library's model.

        `models` are the components by their folders, which may be on the meta device; `made` names the whole in
        messages. Raises SourceError where a layer is of no component, or has another shape.
        """
        known = {name: place for folder, model in models.items() for name, place in _layers(folder, model).items()}
        if unknown := [name for name in self.layers if _flat(name) not in known]:
            raise SourceError(
                f"{self.path} has {listing(unknown)} which no layer of this {made} matches: it was made for another "
                "model. Take a LoRA of the same architecture"
            )
        found: dict[str, dict[str, LowRank]] = {folder: {} for folder in models}
        misfits = []
        for name, low_rank in self.layers.items():
            folder, weight, shape = known[_flat(name)]
            found[folder][weight] = low_rank
            if not low_rank.fits(shape):
                misfits.append(
                    f"{name} ({list(low_rank.up.shape)} times {list(low_rank.down.shape)}, its layer's weight is "
                    f"{list(shape)})"
                )
        if misfits:
            raise SourceError(
                f"{self.path} does not fit this {made}: of another shape {listing(misfits)}. It was made for a model "
                "of other widths: take a LoRA of the same architecture"
            )
        return {folder: layers for folder, layers in found.items() if layers}


def read_lora(path: Path) -> Lora:
    """Read the names and shapes of a LoRA file, and none of its tensors but the alphas.

    Raises NotFound where there is no such file, SourceError where it is damaged, a pickle or incomplete, and
    UnsupportedModel where it holds another kind of adapter, which is named.
    """
    if path.is_file() and path.suffix != ".safetensors":
        with path.open("rb") as file:
            what = other_content(file.read(64)) or "is no .safetensors file"
        raise SourceError(f"{path} {what}: expected a LoRA as .safetensors. Save it in that format")
    header, tensors = read_header(path)
    _refuse_kinds(path, tensors)
    by_role: dict[str, dict[str, TensorRef]] = {role: {} for role in ROLES}
    unknown = []
    for name, ref in tensors.items():
        role, match = next(((role, m) for role, pattern in ROLES.items() if (m := pattern.search(name))), ("", None))
        if match is None:
            unknown.append(name)
        else:
            by_role[role][name[: match.start()]] = ref
    _require_whole(path, by_role, unknown)
    factors = _Factors(path, by_role["alpha"], _metadata(header))
    layers = {
        name: LowRank(by_role["up"][name], down, factors.of(name, down.shape[0] if down.shape else 0))
        for name, down in by_role["down"].items()
    }
    return Lora(path, layers, tensors, sha256(path))


def _refuse_kinds(path: Path, names: Iterable[str]) -> None:
    for kind, pattern in KINDS.items():
        if found := [name for name in names if pattern.search(name)]:
            raise UnsupportedModel(
                f"{path} is an adapter of another kind than LoRA ({kind}: {listing(found)}), which cannot be read: "
                "fuse it into its model with the library that made it, and build that"
            )


def _require_whole(path: Path, by_role: Mapping[str, Mapping[str, TensorRef]], unknown: list[str]) -> None:
    """Raises SourceError where a layer lacks one of its tensors, or there are others."""
    up, down, alpha = by_role["up"], by_role["down"], by_role["alpha"]
    faults = []
    if missing := [f"{name} (no {'up' if name in down else 'down'})" for name in down.keys() ^ up.keys()]:
        faults.append(f"layers without one of their two matrices: {listing(sorted(missing))}")
    if extra := unknown + [f"{name}.alpha" for name in alpha if name not in down and name not in up]:
        faults.append(f"tensors that belong to no layer: {listing(sorted(extra))}")
    if not down and not up:
        faults.append("no tensor of a LoRA")
    if faults:
        raise SourceError(f"{path} is no whole LoRA: it has {'; '.join(faults)}. Take the file as it was published")


def _metadata(header: bytes) -> dict[str, Any]:
    """The configuration of PEFT that diffusers writes into the file's header: keys such as `unet.lora_alpha`."""
    try:
        found = json.loads(json.loads(header).get("__metadata__", {}).get(METADATA, "{}"))
    except (ValueError, AttributeError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class _Factors:
    """How much each product counts: alpha / rank, where neither the file's alphas nor its configuration say otherwise
    1.
    """

    path: Path
    alphas: Mapping[str, TensorRef]
    config: Mapping[str, Any] = field(default_factory=dict)

    def of(self, layer: str, rank: int) -> float:
        if rank < 1:
            raise SourceError(f"{self.path}: {layer} has rank {rank}, expected 1 or more. Take the file as published")
        alpha, divisor = self._alpha(layer), float(rank)
        if self._setting(layer, "use_rslora"):
            divisor = math.sqrt(rank)
        factor = 1.0 if alpha is None else alpha / divisor
        if not math.isfinite(factor):
            raise SourceError(f"{self.path}: {layer} has alpha {alpha}, expected a number. Take the file as published")
        return factor

    def _alpha(self, layer: str) -> float | None:
        if layer in self.alphas:
            stored = self.alphas[layer].array()
            return float(stored.reshape(-1)[0]) if stored.size == 1 else math.nan
        inside = layer.partition(".")[2]
        for pattern, alpha in dict(self._setting(layer, "alpha_pattern") or {}).items():
            if re.search(rf"(^|\.)({pattern.removeprefix('^')})$", inside):
                return float(alpha)
        found = self._setting(layer, "lora_alpha")
        return None if found is None else float(found)

    def _setting(self, layer: str, name: str) -> Any:
        return self.config.get(f"{layer.partition('.')[0]}.{name}")


def _flat(layer: str) -> str:
    """A layer's name in a form that all layouts share: its component and its path, with underscores."""
    for prefix, component in KOHYA.items():
        if layer.startswith(prefix):
            return f"{component}/{layer.removeprefix(prefix).removeprefix('text_model_')}"
    component, _, path = layer.partition(".")
    path = path.removeprefix("text_model.").replace(".processor.", ".")
    if component.startswith("text_encoder"):
        last = path.rpartition(".")[2]
        path = path.removesuffix(last) + OLDER.get(last, last)
    elif path.endswith("to_out"):
        path += ".0"
    return f"{component}/{path.replace('.', '_')}"


def _layers(folder: str, model: nn.Module) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """The layers that a LoRA may change, by flat name: component, name and shape of the weight."""
    from torch import nn

    found = {}
    original = dict(_original_blocks(model)) if hasattr(model, "up_blocks") else {}  # a control network has none
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            place = folder, f"{path}.weight", tuple(module.weight.shape)
            for name in (path, _original(path, original)):
                found[f"{folder}/{name.removeprefix('text_model.').replace('.', '_')}"] = place
    return found


OUTSIDE: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET: Final = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
"""Layers outside the blocks of a UNet, and those of a residual block, by their names in the original code."""


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """The blocks of a UNet with their names in the original code (openaimodel.py of latent-diffusion), which counts
    through: residual and attention layers of each block, and what changes its size.
    """
    number = 1
    for i, block in enumerate(unet.down_blocks):
        yield from _layers_of(f"down_blocks.{i}", block, "input_blocks", number)
        number += len(block.resnets)
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        number += bool(block.downsamplers)
    for name, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        yield f"mid_block.{name}", f"middle_block.{place}"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        yield from _layers_of(f"up_blocks.{i}", block, "output_blocks", number)
        number += len(block.resnets)
        place = 2 if getattr(block, "attentions", None) else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _layers_of(path: str, block: Any, original: str, first: int) -> Iterator[tuple[str, str]]:
    for j in range(len(block.resnets)):
        yield f"{path}.resnets.{j}", f"{original}.{first + j}.0"
        yield f"{path}.attentions.{j}", f"{original}.{first + j}.1"


def _original(path: str, blocks: Mapping[str, str]) -> str:
    """The name of a UNet's layer in the original code."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    for block, name in blocks.items():
        if path == block:
            return name
        if path.startswith(f"{block}."):
            inside = path.removeprefix(f"{block}.")
            return f"{name}.{RESNET.get(inside, inside)}"
    return path
