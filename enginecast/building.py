"""Building a bundle from Python. The build side is imported when `build` is called, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from runtime.bundle.manifest import Bundle
from runtime.errors import MissingDependency

if TYPE_CHECKING:
    from export.report.progress import Report


class BuildOptions(TypedDict, total=False):
    """Options of a build besides its target and quantization. The defaults are those of `enginecast build`."""

    name: str
    """Name of the model for clients. Default: the source's name."""
    parity: str
    """Comparison of each graph with the library's own model: "auto", "full" (all weights) or "twin" (fewer layers)."""
    calibration: Path | None
    """Calibration set made by `enginecast calibrate`. Default: captured from built-in requests."""
    quality: str
    """Compare the quantized model with the float one: "auto" (up to 1 GB of weights), "full" or "none"."""
    speed: str
    """Time the quantized model beside the float one and PyTorch: "auto" (up to 256 MB), "full" or "none"."""
    agreement: str
    """Compare each compiled target with the model's graph: "auto" (up to 1 GB of weights), "full" or "none"."""
    allow_low_quality: bool
    """Keep a bundle that falls below the floors."""
    max_drop: float
    """For quant "auto": allowed drop in points of the score, or in dB below int8 if there is no score. Default: 1."""
    compute: str
    """Precision of the computation where measurements allow it: "auto", "float32", "float16", "bfloat16"."""
    block: int
    """For quant "int4": number of inputs that share a scale, 32, 64 or 128."""
    strip_canonical: bool
    """Leave out graphs and weights. Only for targets whose engines hold all they need."""
    settings: Mapping[str, Mapping[str, str]]
    """Settings of targets, by target and name."""
    variant: str
    """The form of the weights that is read where the source has several, such as "fp16". Default: the plain one."""
    config: Path | None
    """Folder with the small files of a source that is a single file: model_index.json, scheduler, tokenizers, and the
    config.json of each network."""
    force: bool
    """Replace another bundle in the output folder."""


def build(
    source: str | Path,
    output: str | Path,
    *,
    targets: Sequence[str] = ("onnxruntime", "openvino"),
    quant: str = "none",
    optimize: Literal["size", "speed"] = "size",
    additions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    progress: Callable[[Report], None] = lambda report: None,
    **options: Unpack[BuildOptions],
) -> Bundle:
    """Convert, quantize and compile a model into a bundle. Nothing is written at `output` before it is complete.

        enginecast.build("./my-checkpoint", "bundles/mine", targets=["openvino"], quant="int8")

    Needs the extra "export". A build that was made before with the same options is verified and returned.

    Args:
        source: Checkpoint folder in diffusers or transformers layout, a hub id, a single .safetensors file of Stable
            Diffusion (with `config`), or "sample:shapes-diffusion" and "sample:shapes-vlm".
        output: Folder of the bundle.
        targets: Engines to compile for; "auto" stands for all that can be compiled here.
        quant: "none", "int8", "int8-weight", "int4", "fp8", "fp16", "bf16", or "auto" (limited by `max_drop`).
        optimize: For quant "auto": find the smallest model within `max_drop`, or the one with the least computation.
        additions: What is added to the source, by kind: each as its option takes it, `[NAME=]PATH[:SCALE]`.
            Kinds that the model's family does not take are refused.
        progress: Called when a step begins, about once a second while it runs, and when it ends (`seconds` is then a
            number). `eta` is the estimated seconds that all remaining steps take.
        options: See `BuildOptions`.

    Raises:
        MissingDependency: The extra "export" is not installed.
        InvalidInput: Options do not fit the model or each other; `field` names one.
        SourceError: The checkpoint is missing, damaged, or of no known family (UnsupportedModel).
        ParityError: A graph does not reproduce the checkpoint.
        QualityError: The quantized model falls below the floors.
        EngineError: A target failed to compile.
        ResourceExhausted: There is not enough memory or disk space.
    """
    try:
        from export.build.build import build as run
        from export.build.options import Options
        from export.checkpoint.additions import parse_all
        from export.finished.artifacts import resolve_targets
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "torch", "export") from None
    chosen = resolve_targets([targets] if isinstance(targets, str) else targets, quant)
    added = parse_all({kind: [one] if isinstance(one, str) else one for kind, one in additions.items()})
    wanted = Options(str(source), Path(output), targets=chosen, quant=quant, goal=optimize, additions=added, **options)
    return run(wanted, progress)[0]
