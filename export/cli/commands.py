"""The build side's commands of `enginecast`: build, calibrate, report, and those on finished bundles."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.table import Table

from export.checkpoint.additions import KINDS, Addition, parse_all
from export.cli import bundles, preprocess
from export.cli.additions import with_additions
from export.report.console import errors, out, settings_of, show, show_notes
from export.report.sizes import forms
from runtime import command
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput, MissingDependency
from runtime.stopping import stoppable

SETTINGS: Final = "enginecast.toml"
SAMPLES: Final = ("sample:shapes-diffusion", "sample:shapes-vlm")
TARGETS: Final = ("onnxruntime", "openvino")
GRAPH_FORMS: Final = {"in float16": 16, "in int8": 8, "in int4": 4}
"""Bits of a weight in each form."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bundles.app)
app.add_typer(preprocess.app, name="preprocess")


Source = Annotated[
    str | None,
    typer.Argument(
        help="Checkpoint folder or single file, sample:NAME or hub id. Default: what enginecast.toml lists, else both "
        "samples."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Engine to compile for, or auto: all that this machine can; repeat for several. Default: onnxruntime and "
        "openvino."
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        help="none (the default), int8, int8-weight, int4, nf4, fp8, fp16, bf16, or auto: what --max-drop allows."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the bundle; with several sources, the folder they go into. Default: bundles/NAME-QUANT."
    ),
]
Parity = Annotated[str, typer.Option(help="auto, full (all weights) or twin (fewer layers).")]
Name = Annotated[str, typer.Option(help="What clients call the model. Default: the source's name.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Set to calibrate with (see `calibrate`). Default: captured now.")
]
Quality = Annotated[
    str,
    typer.Option(help="Compare the quantized model with the float one: auto (up to 1 GB of weights), full or none."),
]
Speed = Annotated[
    str,
    typer.Option(
        help="Time the quantized model beside the float one and PyTorch: auto (up to 256 MB of weights), full or none."
    ),
]
AllowLowQuality = Annotated[
    bool, typer.Option("--allow-low-quality", help="Keep a bundle that falls below the floors.")
]
Agreement = Annotated[
    str,
    typer.Option(
        help="Compare what each target compiled with the model's graph: auto (up to 1 GB of weights), full or none."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        min=0, help="Of --quant auto: points of the score, or dB below int8 where there is no score. Default: 1."
    ),
]
Optimize = Annotated[str | None, typer.Option(help="Of --quant auto: size (the default) or speed.")]
Compute = Annotated[
    str,
    typer.Option(
        help="What targets that have it may compute in where that is measured to do no harm: float16, bfloat16; auto."
    ),
]
Block = Annotated[
    int,
    typer.Option(
        help="Of --quant int4 and nf4: inputs that share a scale, 32, 64 or 128; fewer are nearer, and larger. "
        "Default: 64."
    ),
]
ComputeCapability = Annotated[str, typer.Option(help="Of tensorrt targets: the GPUs to compile for, such as 8.9,12.0.")]
TargetSettings = Annotated[
    list[str] | None, typer.Option(help="A target's own setting, TARGET.NAME=VALUE; repeat for several.")
]
StripCanonical = Annotated[
    bool,
    typer.Option(
        "--strip-canonical", help="Leave out graphs and weights; for targets alone whose engines hold all they need."
    ),
]
GraphOnly = Annotated[
    bool,
    typer.Option(
        "--graph-only",
        help="Write the graphs alone, from the config files: no weights are read or needed. Default folder: "
        "graphs/NAME.",
    ),
]
Variant = Annotated[
    str,
    typer.Option(help="Form of the weights to read where a folder has several, such as fp16. Default: the plain one."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Of a SOURCE that is a single file: folder with its small files, such as model_index.json, scheduler and "
        "tokenizer."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace another bundle that lies at the output.")]


@app.command()
@stoppable("nothing was written")
@with_additions
def build(
    context: typer.Context,
    source: Source = None,
    target: Targets = None,
    quant: Quant = None,
    output: Output = None,
    parity: Parity = "auto",
    name: Name = "",
    calibration: Calibration = None,
    quality: Quality = "auto",
    speed: Speed = "auto",
    allow_low_quality: AllowLowQuality = False,
    agreement: Agreement = "auto",
    max_drop: MaxDrop = None,
    optimize: Optimize = None,
    compute: Compute = "auto",
    block: Block = 0,
    compute_capability: ComputeCapability = "",
    setting: TargetSettings = None,
    strip_canonical: StripCanonical = False,
    graph_only: GraphOnly = False,
    variant: Variant = "",
    config: Config = None,
    force: Force = False,
    additions: Sequence[Addition] = (),
) -> None:
    """Convert, quantize and compile a model into a bundle."""
    if graph_only:
        return _build_graphs(source, output, force, additions, context)
    common: dict[str, Any] = {"parity": parity, "force": force, "name": name, "calibration": calibration}
    common |= {"quality": quality, "speed": speed, "agreement": agreement, "allow_low_quality": allow_low_quality}
    common |= {"compute": compute, "block": block, "strip_canonical": strip_canonical}
    searched = {key: value for key, value in (("max_drop", max_drop), ("goal", optimize)) if value is not None}
    _require_source(source, {"name": name, "calibration": calibration, "variant": variant, "config": config}, additions)
    if source is not None:
        read = {"variant": variant, "config": config, "additions": additions}
        jobs = [_job(source, target, quant or "none", output) | read]
    else:
        jobs = _listed(target, quant, output)
    for options in [_options(job, common, searched, compute_capability, setting or []) for job in jobs]:
        _build(options)


def _build_graphs(
    source: str | None, output: Path | None, force: bool, additions: Sequence[Addition], context: typer.Context
) -> None:
    """Write a model's graphs, and print how large its weights would be."""
    takes = {"source", "output", "force", "graph_only", *(kind.replace("-", "_") for kind in KINDS)}
    for name in context.params.keys() - takes:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            raise InvalidInput(name.replace("_", "-"), "does not apply to --graph-only, which makes no bundle")
    _require_source(source, {}, additions)
    if source is None:
        raise InvalidInput("graph-only", "needs a SOURCE: a folder with the config files of a model")
    if Path(source).is_file():
        raise InvalidInput("graph-only", f"reads config files, and {source} has none: name the folder that has them")
    from export.build.graphs import build_graphs

    place = output or Path("graphs") / _name_of(source)
    out.print(f"{source} -> {place} (graphs without weights)")
    graphs, timings = build_graphs(source, place, additions, force, show)
    table = Table("submodel", "nodes", "weights", *GRAPH_FORMS, "parity of the twin")
    for graph in graphs:
        sizes = (f"{graph.weights * bits / 8e6:,.1f} MB" for bits in GRAPH_FORMS.values())
        table.add_row(graph.submodel, str(graph.nodes), f"{graph.weights:,}", *sizes, f"{graph.parity.error:.1e}")
    out.print(table)
    out.print(f"{place}: {len(graphs)} graphs in {sum(timings.values()):.1f} s")


def _require_source(source: str | None, own: Mapping[str, object], additions: Sequence[Addition]) -> None:
    """Raise InvalidInput for options of one model where no SOURCE names it, MissingDependency without the build side's
    packages.
    """
    try:
        import export.build.options  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "torch", "export") from None
    for option in (name for name, value in own.items() if value and not source):
        raise InvalidInput(option, "is of one model, so it needs a SOURCE")
    if additions and not source:
        raise InvalidInput(additions[0].kind, "is added to one model, so it needs a SOURCE")


def _options(
    job: dict[str, Any], common: dict[str, Any], searched: dict[str, Any], capability: str, settings: list[str]
) -> Any:
    """The checked options of one build; `searched` are those of --quant auto. Raises InvalidInput, or what
    `Options.check` raises.
    """
    from export.build.options import Options
    from export.finished.artifacts import resolve_targets

    if searched and job["quant"] != "auto":
        name = "max-drop" if "max_drop" in searched else "optimize"
        raise InvalidInput(name, f"belongs to --quant auto, not to {job['quant']}")
    targets = resolve_targets(job["targets"], job["quant"])
    own = settings_of(targets, capability, settings)
    options = Options(**common, **searched, **(job | {"targets": targets, "settings": own}))
    options.check()
    return options


def _name_of(source: str) -> str:
    """What the folder of a source's bundle is called."""
    if Path(source).exists():
        return Path(source).resolve().stem if Path(source).is_file() else Path(source).resolve().name
    return source.removeprefix("sample:").rstrip("/").split("/")[-1]


def _job(source: str, target: list[str] | None, quant: str, output: Path | None) -> dict[str, Any]:
    return {
        "source": source,
        "targets": tuple(target or TARGETS),
        "quant": quant,
        "output": output or Path("bundles") / f"{_name_of(source)}-{quant}",
    }


def listed(given: list[str] | str | None) -> list[str]:
    """Several, one or none, as a list."""
    return [given] if isinstance(given, str) else given or []


class Entry(BaseModel):
    """One [[build]] table of enginecast.toml: the options of `build` under the same names, those of additions too."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    target: list[str] | str | None = None
    quant: str = "none"
    output: Path | None = None
    variant: str = ""
    config: Path | None = None
    additions: dict[str, list[str] | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "additions" in given:
            return given
        added = {kind: given[kind] for kind in KINDS if kind in given}
        return {key: value for key, value in given.items() if key not in added} | {"additions": added}

    def added(self) -> tuple[Addition, ...]:
        """What is added to the source."""
        return parse_all({kind: listed(texts) for kind, texts in self.additions.items()})


class BuildFile(BaseModel):
    """enginecast.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    build: list[Entry] = Field(min_length=1)


def _listed(target: list[str] | None, quant: str | None, output: Path | None) -> list[dict[str, Any]]:
    """What enginecast.toml lists, else the samples. Options of the command line win."""
    path, jobs = Path(SETTINGS), []
    for entry in _settings(path).build if path.is_file() else [Entry(source=sample) for sample in SAMPLES]:
        job = _job(entry.source, target or listed(entry.target), quant or entry.quant, entry.output)
        job |= {"variant": entry.variant, "config": entry.config, "additions": entry.added()}
        if output is not None:
            job["output"] = output / job["output"].name
        jobs.append(job)
    return jobs


def _settings(path: Path) -> BuildFile:
    try:
        return BuildFile.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(SETTINGS, f"is no TOML: {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        options = "target, quant, output, variant, config and additions"
        expected = f"expected [[build]] tables with a source and, if wanted, {options}"
        raise InvalidInput(SETTINGS, f"'{where}' is wrong ({fault['msg']}), {expected}") from None


def _build(options: Any) -> None:
    start = time.perf_counter()
    out.print(f"{options.source} -> {options.output} ({options.quant}, {', '.join(options.targets)})")
    from export.build.build import build as run  # after the first line: its libraries take seconds to import

    bundle, timings = run(options, show)
    show_notes(bundle.manifest)
    size = sum(submodel.nbytes for submodel in bundle.manifest.submodels)
    if not timings:
        out.print(f"{options.output} is up to date: the same build made it before ({size / 1e6:.1f} MB)")
        _show_forms(bundle)
        return
    compiling = sum(seconds for stage, seconds in timings.items() if stage.startswith("compile"))
    total = time.perf_counter() - start
    out.print(
        f"{options.output}: {size / 1e6:.1f} MB of weights in {total:.1f} s, {compiling:.1f} s of them compiling in "
        "the engines' own code"
    )

    if options.quant == "auto":
        _show_search(bundle.root)
    _show_forms(bundle)


def _show_forms(bundle: Bundle) -> None:
    """What the weights of each submodel, and of all, became, and why the rest did not become it."""
    submodels, quant = bundle.manifest.submodels, bundle.manifest.quant
    for name, some in [*((one.name, [one]) for one in submodels), ("all weights", submodels)]:
        if shares := forms(some, quant):
            out.print(f"{name}: {shares}", markup=False)


def _show_search(root: Path) -> None:
    """The assignments that a search tried, and how sure it is of the one it took."""
    from export.build.auto import FILE, Found

    found = Found.model_validate_json((root / FILE).read_bytes())
    table = Table(
        "taken",
        "cost",
        "least SNR",
        f"drop, {found.unit}",
        "give or take",
        "cases",
        f"within {found.max_drop:g}",
        "layers",
    )
    for number, point in enumerate(found.points):
        layers = ", ".join(f"{count} {form}" for form, count in point.layers.items())
        mark = "*" if number == found.chosen else ""
        error = "" if point.resolution is None else f"{point.resolution:.1f}"
        sure = "" if point.sure is None else f"{100 * point.sure:.0f} % sure"
        cases = str(point.cases or "")
        table.add_row(
            mark, f"{point.cost:.3f}", f"{point.snr_db:.1f} dB", f"{point.drop:+.1f}", error, cases, sure, layers
        )
    out.print(table)
    for name, explored in found.submodels.items():
        out.print(f"{name}: noises {explored.method} in {explored.runs} runs")
    out.print(found.claim)


@app.command()
@stoppable("what was captured is kept, and the same command goes on from there")
@with_additions
def calibrate(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, sample:NAME or hub id.")],
    output: Annotated[Path, typer.Option(help="File to write, such as set.safetensors.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts, one a line.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures; to draw with, each with a caption (x.png, x.txt).")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"image": path, "question": text}, for models that chat.')
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Most requests to run. Default: 8 built-in ones, or 128 of your own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws order, noise and choice.")] = 0,
    variant: Variant = "",
    config: Config = None,
    additions: Sequence[Addition] = (),
) -> None:
    """Capture a calibration set: what a model's submodels get while it works. Stopped, the same command goes on."""
    try:
        from export.build.options import CaptureOptions

        options = CaptureOptions(source, output, prompts, images, questions, count, seed, variant, config, additions)
        options.check()
        out.print(f"{source} -> {output} (calibration set)")
        from export.build.calibrate import calibrate as run
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "torch", "export") from None
    found = run(options, show)
    kept = ", ".join(f"{len(calls)} of {name}" for name, calls in found.samples.items())
    out.print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {kept}, from {found.settings['requests']} requests")
    for warning in found.warnings():
        errors.print(f"warning: {warning}", markup=False)


@app.command()
@stoppable("no report was written")
@with_additions
def report(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    speed: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Time the bundle here and now, beside the checkpoint that it was built from."
        ),
    ] = "",
    variant: Variant = "",
    config: Config = None,
    additions: Sequence[Addition] = (),
) -> None:
    """Write the quality report of a quantized bundle as one page."""
    try:
        from export.report.page import check_output
        from export.report.page import report as write
        from export.report.quality import load_quality

        if speed:
            from export.report.timed import time_bundle
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "jinja2", "export") from None
    if additions and not speed:
        raise InvalidInput(additions[0].kind, "belongs to --speed: name the checkpoint that it is added to")
    for option in (name for name, value in (("variant", variant), ("config", config)) if value and not speed):
        raise InvalidInput(option, "belongs to --speed: name the checkpoint that it is of")
    opened = Bundle(bundle)
    load_quality(opened)
    check_output(output)
    opened.verify(unknown=False)  # what is shown is what was measured
    write(opened, output, time_bundle(opened, speed, show, variant, config, additions) if speed else None)
    out.print(f"{output}: quality of {bundle}")


def main() -> None:
    """Entry point of `python -m export` and `uv run export`: a mistake of the user is one line on standard error and an
    exit code.
    """
    command.run(partial(app, prog_name="enginecast"), "interrupted: nothing was written")
