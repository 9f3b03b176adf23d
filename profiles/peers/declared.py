"""The peers: which tools are measured beside ours, in which environments, and on what they make of a checkpoint.

In the command of an export, {checkpoint} and {output} are folders, and the Python of the environment gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runtime.bundle.manifest import Bundle
from runtime.diffusion.config import DiffusionConfig
from runtime.errors import InvalidInput, did_you_mean
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest

INSIDE: Final = "profiles.peers"
OPTIMUM: Final = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", "{checkpoint}")


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what pip installs there, what is removed again, and variables for building packages."""

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """What a tool makes of a checkpoint, kept in a folder of this name."""

    name: str
    environment: Environment
    command: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """A tool that runs models of a task in a way of its own: its worker in `profiles.peers.workers`, with options of
    that worker. It loads the export, or the checkpoint itself where that is None.
    """

    name: str
    task: str
    environment: Environment
    worker: str
    export: Export | None
    metrics: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    form: str = ""
    """What its large products are made in, as `profiles.roofline` has them; "" where no limit follows from that."""
    usual: bool = True
    """Whether it is measured where no names are given."""
    named: tuple[str, ...] = ()
    """Further metrics, which take so long that they are measured only where they are named."""


# optimum-intel needs transformers below 5.6. transformers cannot be imported with a torchvision for CUDA beside a torch
# for CPUs.
OPENVINO: Final = Environment(
    "openvino",
    (
        "optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0", "transformers==5.5.4", "diffusers==0.39.0", "torch==2.13.0",
        "accelerate", "pillow",
    ),
    removed=("torchvision",),
)  # fmt: skip
# Built from source for this processor. GCC before 13 takes the stores of the tiles' shapes for dead: with AMX, every
# product then ends in an illegal instruction.
CPP: Final = Environment(
    "cpp",
    ("gguf==0.19.0", "numpy", "pillow", "llama-cpp-python==0.3.36", "stable-diffusion-cpp-python==0.4.7"),
    variables={"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"},
)
TORCH: Final = Environment(
    "torch", ("torch==2.13.0", "diffusers==0.42.0", "transformers==5.23.0", "accelerate", "pillow"), ("torchvision",)
)

FLOAT: Final = Export(
    "optimum-float32",
    OPENVINO,
    (*OPTIMUM, "--task", "text-to-image", "--library", "diffusers", "--weight-format", "fp32", "{output}"),
)
HYBRID: Final = Export("optimum-hybrid", OPENVINO, ("-m", f"{INSIDE}.exports.hybrid", "{checkpoint}", "{output}"))
INT4: Final = Export("optimum-int4", OPENVINO, ("-m", f"{INSIDE}.exports.genai_int4", "{checkpoint}", "{output}"))
DECODER: Final = Export("decoder-q4-0", CPP, ("-m", f"{INSIDE}.exports.decoder_gguf", "{checkpoint}", "{output}"))
PICTURE: Final = Export("picture-q8-0", CPP, ("-m", f"{INSIDE}.exports.picture_gguf", "{checkpoint}", "{output}"))

UNET: Final = ("unet",)
WHOLE: Final = ("picture",)
TEXT: Final = ("prefill", "decode")
ANSWER: Final = ("first_token", *TEXT)
CHAT: Final = ("first_token", "follow_up", *TEXT)


def _hybrid(name: str, precision: str) -> Peer:
    # As exported, with dynamic shapes, its int8 computes wrongly on processors without AMX (decision 11).
    label = "static" if precision == "f32" else f"static {precision}"
    options = {"precision": precision, "static": True, "target": label, "quant": "hybrid"}
    return Peer(name, ImageRequest.task, OPENVINO, "optimum_diffusion", HYBRID, UNET, options, "int8", named=WHOLE)


def _torch(name: str, task: str, worker: str, metrics: tuple[str, ...], precision: str, compiled: bool = False) -> Peer:
    label = f"compiled {precision}" if compiled else f"eager {precision}"
    options = {"precision": precision, "compiled": compiled, "target": label}
    return Peer(name, task, TORCH, worker, None, metrics, options, precision, usual=False)


PEERS: Final = (
    _hybrid("optimum-intel-hybrid", "f32"),
    _hybrid("optimum-intel-hybrid-bf16", "bf16"),
    Peer(
        "optimum-intel", ImageRequest.task, OPENVINO, "optimum_diffusion", FLOAT, UNET,
        {"precision": "f32", "static": True, "target": "static"}, "float32", named=WHOLE,
    ),
    Peer("stable-diffusion.cpp", ImageRequest.task, CPP, "sdcpp", PICTURE, UNET, form="int8"),
    Peer(
        "stable-diffusion.cpp-flash", ImageRequest.task, CPP, "sdcpp", PICTURE, UNET,
        {"flash_attention": True, "target": "flash attention"}, "int8", usual=False,
    ),
    _torch("diffusers", ImageRequest.task, "torch_unet", UNET, "float32"),
    _torch("diffusers-bf16", ImageRequest.task, "torch_unet", UNET, "bfloat16"),
    _torch("diffusers-compiled", ImageRequest.task, "torch_unet", UNET, "float32", compiled=True),
    _torch("diffusers-compiled-bf16", ImageRequest.task, "torch_unet", UNET, "bfloat16", compiled=True),
    Peer("openvino-genai", ChatRequest.task, OPENVINO, "genai", INT4, CHAT, {"quant": "int4"}),
    Peer("llama.cpp", ChatRequest.task, CPP, "llamacpp", DECODER, TEXT),
    _torch("transformers", ChatRequest.task, "torch_chat", ANSWER, "float32"),
    _torch("transformers-bf16", ChatRequest.task, "torch_chat", ANSWER, "bfloat16"),
    _torch("transformers-compiled-bf16", ChatRequest.task, "torch_chat", ANSWER, "bfloat16", compiled=True),
)  # fmt: skip


def peers(task: str, names: Sequence[str]) -> tuple[Peer, ...]:
    """Those of a task: the named ones, all usual ones without names. Raises InvalidInput naming `only`."""
    known = {peer.name: peer for peer in PEERS if peer.task == task}
    if not known:
        raise InvalidInput("CHECKPOINT", f"is a model of the task {task}, which no other tool is measured for")
    for name in names:
        if name not in known:
            raise InvalidInput("only", f"'{name}' is no peer of this checkpoint: {did_you_mean(name, known)}")
    return tuple(known[name] for name in names) or tuple(peer for peer in known.values() if peer.usual)


def usual(chosen: Iterable[Peer]) -> tuple[str, ...]:
    """What is measured of these peers where nothing is named."""
    return tuple(dict.fromkeys(metric for peer in chosen for metric in peer.metrics))


def known(chosen: Sequence[Peer]) -> tuple[str, ...]:
    """What can be measured of them."""
    return tuple(dict.fromkeys((*usual(chosen), *(metric for peer in chosen for metric in peer.named))))


def sizes(bundle: Bundle, given: Mapping[str, int]) -> dict[str, int]:
    """The sizes of what is measured, for workers of ours and of peers: those given, else a task's usual ones."""
    return USUAL[bundle.manifest.task](bundle) | dict(given)


def _pictures(bundle: Bundle) -> dict[str, int]:
    config = DiffusionConfig.parse(bundle.manifest.config)
    return {"width": config.sizes.default, "height": config.sizes.default, "steps": config.defaults.steps}


USUAL: Final[Mapping[str, Callable[[Bundle], dict[str, int]]]] = {
    ImageRequest.task: _pictures,
    ChatRequest.task: lambda bundle: {"prompt_tokens": 512, "new_tokens": 128},
}
