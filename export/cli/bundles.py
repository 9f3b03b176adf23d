"""Commands on finished bundles: look at them, compare them with their hashes, change them, sign them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from export.report.console import errors, out, settings_of, show, show_notes, show_table
from export.report.sizes import forms, sizes
from runtime.bundle import signing
from runtime.bundle.manifest import SIGNATURE, Artifact, Bundle, Submodel, Verdict
from runtime.engine import targets
from runtime.errors import MissingDependency
from runtime.placing.portable import prospect
from runtime.stopping import stoppable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle.")]) -> None:
    """Show what a bundle holds: submodels, signatures, sizes, precisions, parity, artifacts."""
    opened = Bundle(bundle)
    manifest = opened.manifest
    of = f"{manifest.source.architecture} ({manifest.source.family})"
    if manifest.source.additions:
        of += " with " + ", ".join(f"{one.kind} {one.name}:{one.scale:g}" for one in manifest.source.additions)
    _say(f"{manifest.name}: {of}, quant {manifest.quant}, pipeline {manifest.pipeline}")
    _say("made with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    show_notes(manifest)
    if manifest.quality:
        _show_quality(manifest.quality)
    for submodel in manifest.submodels:
        _show_submodel(submodel, manifest.quant)
    _show_artifacts(opened)
    if (bundle / SIGNATURE).exists():
        out.print("signed; `enginecast verify --signature PUBLIC` shows by whom")
    _show_sizes(opened)
    if weights := forms(manifest.submodels, manifest.quant):
        _say(f"weights: {weights}")


def _say(line: str, style: str = "") -> None:
    """A line of text from a bundle, printed as it is."""
    out.print(line, style=style, markup=False)


def _show_quality(verdict: Verdict) -> None:
    _say("quality " + ", ".join(f"{name} {figure:.4g}" for name, figure in verdict.figures.items()))
    for fault in verdict.shortfalls:
        _say(f"below its floor, and allowed: {fault}", "bold")


def _show_submodel(submodel: Submodel, quant: str) -> None:
    parity, signature = submodel.parity, submodel.signature
    checked = (
        f"parity {parity.method}, error {parity.error:.1e}, SNR {parity.snr_db:.0f} dB" if parity else "not compared"
    )
    _say(f"\n{submodel.name}: {submodel.nbytes / 1e6:.1f} MB, {submodel.precision}, {checked}", "bold")
    if weights := forms([submodel], quant):
        _say(f"  weights: {weights}")
    for arrow, tensors in (("<-", signature.inputs), ("->", signature.outputs)):
        for tensor in tensors:
            _say(f"  {arrow} {_tensor(tensor)}")
    if signature.states:
        _say(f"  {len(signature.states)} states, such as {_tensor(signature.states[0].past)}")


def _show_artifacts(bundle: Bundle) -> None:
    """A table of what was compiled for each target, and why some of it does not fit this machine."""
    artifacts = bundle.manifest.artifacts
    fits = [prospect(bundle, artifact) for artifact in artifacts]
    columns = ("target", "submodel", "files", "compiled for", "compile s", "agreement", "fits here")
    show_table(columns, *(_artifact(artifact, fit.word) for artifact, fit in zip(artifacts, fits, strict=True)))
    reasons = (f"{one.target}: {fit.why}" for one, fit in zip(artifacts, fits, strict=True) if fit.why)
    for reason in dict.fromkeys(reasons):
        _say(reason)


def _artifact(artifact: Artifact, fits: str) -> tuple[str, ...]:
    stored = ", ".join(dict.fromkeys(file.split("/")[0] for file in artifact.files))
    files = f"{artifact.folder}/" * bool(artifact.folder) + stored or "compiled at load"
    machine = ", ".join(f"{name} {value}" for name, value in artifact.key.items()) or "any machine"
    seconds = f"{artifact.seconds:.1f}"
    return (artifact.target, artifact.submodel, files, machine, seconds, _agreement(artifact), fits)


def _agreement(artifact: Artifact) -> str:
    """How near the compiled artifact is to the canonical graph, where it could be computed."""
    return (
        f"{artifact.agreement.snr_db:.0f} dB"
        if artifact.agreement
        else "not computed"
        if artifact.unchecked
        else "not compared"
    )


def _show_sizes(bundle: Bundle) -> None:
    """The size of a bundle, part by part, beside bundles of one target each."""
    found = sizes(bundle)
    graphs = (
        "without canonical graphs" if not found.graphs else f"canonical graphs and weights {found.graphs / 1e6:.1f} MB"
    )
    parts = [
        graphs,
        *(f"{name} {size / 1e6:.1f} MB" for name, size in found.targets.items()),
        f"other files {found.rest / 1e6:.1f} MB",
    ]
    alone = f"; as bundles of one target each, {found.apart / 1e6:.1f} MB" if len(found.targets) > 1 else ""
    out.print(f"{found.total / 1e6:.1f} MB: {', '.join(parts)}{alone}")


def _tensor(tensor: Any) -> str:
    dims = (str(dim) if isinstance(dim, int) else f"{dim.name} {dim.min}..{dim.max}" for dim in tensor.dims)
    return f"{tensor.name} {tensor.dtype} [{', '.join(dims)}]"


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle.")],
    signature: Annotated[
        Path | None, typer.Option(metavar="PUBLIC", help="Require a signature by the owner of this public key.")
    ] = None,
) -> None:
    """Compare every file of a bundle with its hash, and the manifest with its signature where --signature is given."""
    opened = Bundle(bundle)
    if signature is None:
        opened.verify()
    else:
        signing.require_signature(opened, signature)
    signed = f", signed by the owner of {signature}" if signature else ""
    out.print(f"{bundle}: {len(opened.manifest.files)} files, all as they were built{signed}")


BundleArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle, which is changed.")]
KeyOption = Annotated[
    Path | None, typer.Option(metavar="PRIVATE", help="Of a signed bundle: sign it anew with this key.")
]
DropOption = Annotated[bool, typer.Option("--force", help="Of a signed bundle: drop its signature.")]


@app.command("add-target")
@stoppable("the bundle is as it was")
def add_target(
    bundle: BundleArgument,
    target: Annotated[
        list[str], typer.Option(help="Engine to compile for, or auto: all that this machine can; repeat for several.")
    ],
    compute_capability: Annotated[
        str, typer.Option(help="Of tensorrt targets: the GPUs to compile for, such as 8.9,12.0.")
    ] = "",
    setting: Annotated[
        list[str] | None, typer.Option(help="A target's own setting, TARGET.NAME=VALUE; repeat for several.")
    ] = None,
    key: KeyOption = None,
    force: DropOption = False,
) -> None:
    """Compile a bundle for one more target, or for another machine, from its own graphs: no checkpoint and no torch are
    needed.
    """
    try:
        from export.build.options import check_settings
        from export.finished import artifacts
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "onnx_ir", "export") from None
    names = artifacts.resolve_targets(target, Bundle(bundle).manifest.quant)
    settings = settings_of(names, compute_capability, setting or [])
    check_settings(names, settings)
    dropped = (bundle / SIGNATURE).exists() and key is None
    for name in names:
        opened, added = artifacts.add_target(bundle, name, settings.get(name), artifacts.Signed(key, force), show)
        out.print(f"{bundle}: {name}, {', '.join(f for one in added for f in one.files) or 'compiled at load'}")
    if dropped:
        errors.print(f"warning: {bundle} is no longer signed", markup=False)
    _show_sizes(opened)


@app.command()
def strip(bundle: BundleArgument, key: KeyOption = None, force: DropOption = False) -> None:
    """Leave out the canonical graphs and weights of a bundle. It then runs only where its engines fit."""
    try:
        from export.finished import artifacts
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "onnx_ir", "export") from None
    dropped = (bundle / SIGNATURE).exists() and key is None
    _, freed = artifacts.strip(bundle, artifacts.Signed(key, force))
    out.print(f"{bundle}: {freed / 1e6:.1f} MB less" if freed else f"{bundle} has no canonical graphs")
    if dropped and freed:
        errors.print(f"warning: {bundle} is no longer signed", markup=False)


@app.command()
def keygen(
    private: Annotated[
        Path, typer.Argument(metavar="PRIVATE", help="File for the private key, which signs. Keep it from others.")
    ],
    public: Annotated[
        Path | None,
        typer.Option(help="File for the public key, which servers check with. Default: PRIVATE with .pub.pem."),
    ] = None,
) -> None:
    """Make a pair of keys to sign bundles with."""
    shown = public or private.parent / f"{private.stem}.pub.pem"
    name = signing.generate(private, shown)
    out.print(f"{private} signs, {shown} checks: key {name[:16]}", markup=False)


@app.command()
def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(metavar="PRIVATE", help="Private key, as `keygen` makes them.")],
) -> None:
    """Sign a bundle: servers started with --require-signature take it, and no other."""
    opened = Bundle(bundle)
    made = signing.sign(opened, key)
    out.print(f"{bundle}: {len(opened.manifest.files)} files signed with the key {made.key[:16]}", markup=False)


@app.command("targets")
def show_targets() -> None:
    """Every target: whether it can be compiled for here, whether it runs here, which version, and why not."""
    rows = [("target", "compiles here", "runs here", "version", "devices, or why not")]
    for name, engine in targets().items():
        found = engine.available()
        compiles, runs = ("yes" if one else "no" for one in (found.usable or found.compiles, found.usable))
        rows.append((name, compiles, runs, found.version, ", ".join(found.devices) or found.reason))
    show_table(*rows)
