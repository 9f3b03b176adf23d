"""A bundle timed anew on the machine where this runs, beside the checkpoint it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from export.report.baseline import compare_speed
from export.report.progress import Listener, Progress, ProgressStep
from export.report.speed import Speed
from export.task import THOROUGH, SpeedEffort
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.files import vanishing


def time_bundle(
    bundle: Bundle,
    source: str,
    listen: Listener = lambda report: None,
    variant: str = "",
    config: Path | None = None,
    additions: Sequence[Addition] = (),
    effort: SpeedEffort = THOROUGH,
) -> Speed:
    """Build `source` without quantization for the targets of the bundle, in a temporary folder, and time both beside
    PyTorch.

    `source`, `variant`, `config` and `additions` are what `enginecast build` takes. Raises InvalidInput when the
    bundle was built from something else, and whatever a build raises.
    """
    with vanishing(Path(gettempdir()), "enginecast-") as folder:
        options = Options(source, folder / "float", bundle.targets, variant=variant, config=config, additions=additions)
        state = Build.open(options)
        if state.fingerprint != bundle.manifest.source.fingerprint:
            raise InvalidInput(
                "speed",
                f"'{source}' is not the checkpoint that bundle {bundle.root} was built from: name that one, with its "
                "variant and all that was added to it",
            )
        floating, _ = build(options, listen)
        with Progress([ProgressStep("pipeline", "speed", effort.seconds)], listen).step("pipeline", "speed"):
            return compare_speed(bundle, floating, state.new_parts(), state.weights, effort)
