"""The plugin, and the settings that a submodel is compiled with: number formats, threads, choices of the processor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.engine import Options
from runtime.files import cache_folder
from runtime.optional import require
from runtime.placing.containers import allowance
from runtime.targets.openvino.devices import Where

GROUP: Final = 64
"""Inputs of a layer that share a scale where they are rounded to 8 bits. Layers whose int4 blocks are not a multiple of
it, or whose int8 weights have fewer inputs, are computed in float. See docs/decisions/0009-dynamic-activations.md.
"""


TARGET: Final = "openvino"
SHAPES_CHOICE: Final = "shapes"
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
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
        config |= numbers(group, computes_half(core, submodel))
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = options.threads
        elif values.get("threads") == "all":
            config |= {"INFERENCE_NUM_THREADS": allowance().threads, "ENABLE_HYPER_THREADING": True}
    else:
        config["CACHE_DIR"] = str(cache_folder() / "openvino")  # their compilers take minutes
    return config | {name: value for name, value in options.settings.items() if name not in CHOICES}


def computes_half(core: Any, submodel: Submodel) -> bool:
    """Whether the bundle computes in bfloat16 throughout and the processor has it. Decoders do not: their states could
    not be kept in pages.
    """
    return submodel.precision.compute == "bfloat16" and not submodel.signature.states and has_bfloat16(core)


def has_bfloat16(core: Any) -> bool:
    """Whether the processor has it."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def numbers(group: int, half: bool = False) -> dict[str, Any]:
    """Precision settings of the CPU plugin. Inputs of quantized layers are rounded in groups of this size, 0 for not at
    all.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }


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
