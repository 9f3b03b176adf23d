"""The plugin, and the settings that a submodel is compiled with: number formats, threads, choices of the processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.engine import Options
from runtime.files import cache_folder
from runtime.optional import require
from runtime.placing.containers import allowance
from runtime.placing.processor import cores
from runtime.targets.openvino.devices import Where

log = logging.getLogger(__name__)

GROUP: Final = 64
"""Inputs of a layer that share a scale where they are rounded to 8 bits. Layers whose int4 blocks are not a multiple of
it, or whose int8 weights have fewer inputs, are computed in float. See docs/decisions/0009-dynamic-activations.md.
"""
BFLOAT16_ERROR: Final = 0.01
"""Norm of the error of a product in bfloat16, as a share of its own, that is not exceeded where it is right: 0.0024 on
an Intel Xeon.
"""
TARGET: Final = "openvino"
SHAPES_CHOICE: Final = "shapes"
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "compute": ("float32", "bfloat16"),
    "attention": ("bfloat16", "float32"),
    "zero_points": ("on", "off"),
    SHAPES_CHOICE: ("any", "fixed"),
    "activation_group": (str(GROUP), "32", "0"),
    "threads": ("cores", "all"),
}
"""Choices that depend on the processor, the default first (`runtime.placing.choices`). A bundle that allows inputs of 8
bits in groups of 64 also allows smaller groups and none (0): both are nearer to float. There is a thread for each core,
or for each hardware thread.
"""


@cache
def shared_core() -> Any:
    """One for the process."""
    return require("openvino", "openvino").Core()


def where_of(options: Options) -> Where:
    """The device that the options name."""
    return Where.of(shared_core(), options.device)


def settings_for(
    core: Any, submodel: Submodel, where: Where, options: Options, values: Mapping[str, str]
) -> dict[str, Any]:
    """The plugin's settings. Those of the caller take precedence."""
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if where.cpu:
        group = int(values.get("activation_group", GROUP if submodel.dynamic and where.plain else 0))
        config |= numbers(group, computes_half(core, submodel, options, values))
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = options.threads
        elif values.get("threads") == "all":
            config |= {"INFERENCE_NUM_THREADS": allowance().threads, "ENABLE_HYPER_THREADING": True}
    else:
        config["CACHE_DIR"] = str(cache_folder() / "openvino")  # their compilers take minutes
    return config | {name: value for name, value in options.settings.items() if name not in CHOICES}


def computes_half(core: Any, submodel: Submodel, options: Options, values: Mapping[str, str]) -> bool:
    """Whether it computes in bfloat16 throughout, as the bundle allows and these choices say."""
    return values.get("compute") != "float32" and allows_half(core, submodel, options)


def allows_half(core: Any, submodel: Submodel, options: Options) -> bool:
    """Whether the bundle may compute in bfloat16 throughout, and the plugin can.

    With one thread it cannot in decoders: it divides the work of a feed-forward layer between halves of its threads,
    and the process ends by a division by zero (OpenVINO 2026.4).
    """
    if submodel.precision.compute != "bfloat16" or not has_bfloat16(core) or not multiplies_bfloat16():
        return False
    return not submodel.signature.states or threads(options) > 1


def threads(options: Options) -> int:
    """The least threads that the plugin may have: as many as the options say, else one for each core, or as many as the
    processors' quota pays for.
    """
    allowed = allowance().threads
    return int(options.threads or options.settings.get("INFERENCE_NUM_THREADS", min(cores() or allowed, allowed)))


def has_bfloat16(core: Any) -> bool:
    """Whether the processor has it."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def numbers(group: int, half: bool = False) -> dict[str, Any]:
    """Precision settings of the CPU plugin. Inputs of quantized layers are rounded in groups of this size, 0 for not at
    all.

    In bfloat16 they are not rounded: layers with rounded inputs have no kernels for it. There is an attention over
    pages for it only where caches are in 8 bits. Each position then has scales of its own, so that what is held of it
    does not depend on the call that wrote it.
    """
    if half:
        return {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "u8",
            "KEY_CACHE_QUANT_MODE": "BY_TOKEN",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }


@cache
def multiplies_bfloat16() -> bool:
    """Try products in bfloat16 of one and of many rows. On some processors OpenVINO 2026.4 multiplies them wrongly, as
    was reported of an AMD Ryzen 9950X (its issue 38256).
    """
    ops, rng = require("openvino.opset15", "openvino"), np.random.default_rng(0)
    weights = rng.standard_normal((320, 640), np.float32)
    inputs = ops.parameter([-1, len(weights)], np.float32)
    model = require("openvino", "openvino").Model([ops.matmul(inputs, weights, False, False)], [inputs])
    compiled = shared_core().compile_model(model, "CPU", numbers(0, half=True))
    for rows in (1, 16, 300):
        values = rng.standard_normal((rows, len(weights)), np.float32)
        exact, (found,) = values @ weights, compiled(values).values()
        if not np.linalg.norm(found - exact) < BFLOAT16_ERROR * np.linalg.norm(exact):
            log.warning("OpenVINO multiplies bfloat16 wrongly on this processor: it computes in float32 here")
            return False
    return True


@cache
def processor_rounds() -> bool:
    """Try a product whose result shows it: beside 127, an input of 0.25 is lost in 8 bits."""
    ops = require("openvino.opset15", "openvino")
    inputs = ops.parameter([1, 2 * GROUP], np.float32)
    weights = ops.multiply(
        ops.convert(ops.constant(np.ones((2 * GROUP, 16), np.int8)), "f32"), ops.constant(np.ones((1, 16), np.float32))
    )
    model = require("openvino", "openvino").Model([ops.matmul(inputs, weights, False, False)], [inputs])
    values = np.full((1, 2 * GROUP), 0.25, np.float32)
    values[:, ::GROUP] = 127
    (result,) = shared_core().compile_model(model, "CPU", numbers(GROUP))(values).values()
    return float(result[0, 0]) != float(values.sum())
