"""What a token may be used for, and which scopes each RPC requires."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Scope(StrEnum):
    """What a token may be used for."""

    INFER = "infer"
    """Requests to models."""
    MANAGE = "manage"
    """Loading and unloading models."""
    METRICS = "metrics"
    """Reading the server's metrics."""


ANY: Final = frozenset(Scope)

KSERVE: Final = "inference.GRPCInferenceService"
A1111_LISTS: Final = (
    "cmd-flags", "controlnets", "embeddings", "extensions", "face-restorers", "hypernetworks", "latent-upscale-modes",
    "loras", "memory", "options", "prompt-styles", "realesrgan-models", "samplers", "schedulers", "script-info",
    "scripts", "sd-models", "sd-vae", "upscalers", "vqa/models",
)  # fmt: skip
A1111_WORK: Final = (
    "caption", "extra-batch-images", "extra-single-image", "img2img", "interrogate", "interrupt", "options", "png-info",
    "refresh-checkpoints", "skip", "txt2img", "vqa",
)  # fmt: skip
OPEN: Final = frozenset(
    {
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        *(f"{KSERVE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
        *(f"http/{verb} /" for verb in ("GET", "HEAD")),
    }
)
"""Methods without a token: load balancers call them."""
READING: Final = frozenset(
    {
        "enginecast.v1.ModelService/ListModels",
        "enginecast.v1.ModelService/GetModel",
        "enginecast.v1.ModelService/Status",
        "enginecast.v1.ModelService/ListScripts",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        *(f"{KSERVE}/{name}" for name in ("ServerMetadata", "ModelMetadata", "RepositoryIndex")),
        *(f"a1111/GET /sdapi/v1/{name}" for name in A1111_LISTS),
        *(f"a1111/GET /controlnet/{name}" for name in ("model_list", "module_list", "version")),
        "openai/GET /v1/models",
        "openai/GET /v1/models/{name}",
        *(f"ollama/{call}" for call in ("GET /api/version", "GET /api/tags", "GET /api/ps", "POST /api/show")),
    }
)
"""Methods for every token: what the server offers."""
INFERRING: Final = frozenset(
    {
        "enginecast.v1.ImageService/Generate",
        "enginecast.v1.ChatService/Chat",
        "enginecast.v1.EmbedService/Embed",
        "enginecast.v1.JobService/Stop",
        f"{KSERVE}/ModelInfer",
        "a1111/GET /sdapi/v1/progress",
        "a1111/POST /internal/progress",
        "a1111/WS /sdapi/v1/ws/progress/{id_task}",
        *(f"a1111/POST /sdapi/v1/{name}" for name in A1111_WORK),
        *(f"openai/POST /v1/{path}" for path in ("chat/completions", "embeddings")),
        *(f"openai/POST /v1/images/{path}" for path in ("generations", "edits")),
        *(f"ollama/POST {path}" for path in ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings")),
    }
)
"""Methods for the scope infer. All others need the scope manage: a new method is not open by mistake."""


def required(method: str) -> frozenset[Scope]:
    """The scopes of which one allows a method; none if it needs no token. A method is "package.Service/Method" of gRPC
    or "dialect/VERB /path" of HTTP.
    """
    if method in OPEN:
        return frozenset()
    if method in READING:
        return ANY
    return frozenset({Scope.INFER if method in INFERRING else Scope.MANAGE})


def is_management(method: str) -> bool:
    """Whether a method changes what the server does: such calls are in the audit log."""
    return required(method) == {Scope.MANAGE}
