"""The `enginecast` command. It starts fast: each command imports what it needs when it runs.

The commands in FORWARDS belong to the layers beside this one and are imported by name, on demand, so that a serving
machine needs neither their code nor their dependencies.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime import command
from runtime.errors import InvalidInput, MissingDependency
from runtime.limits import IMAGE_SEED, SEED

if TYPE_CHECKING:
    from runtime.bundle.manifest import Bundle
    from runtime.engine import Options
    from runtime.placing.placement import PlacementOptions
    from runtime.tasks.chat import ChatRequest
    from runtime.tasks.image import ImageRequest
    from serving.dialects.python.session import Session
    from serving.host.job import Model

ADDRESS: Final = "127.0.0.1:50051"
UINT32: Final = 2**32 - 1
UNPARSED: Final = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
FORWARDS: Final = {
    "build": ("export.cli.commands", "Build a bundle from a checkpoint."),
    "calibrate": (
        "export.cli.commands",
        "Capture what a model's submodels get while it works, to calibrate builds with.",
    ),
    "report": ("export.cli.commands", "Write the quality report of a quantized bundle as one page."),
    "inspect": ("export.cli.commands", "Show what a bundle holds."),
    "verify": ("export.cli.commands", "Compare a bundle's files with their hashes."),
    "add-target": ("export.cli.commands", "Compile a bundle for one more target or machine, from its own graphs."),
    "strip": ("export.cli.commands", "Leave out the canonical graphs and weights of a bundle."),
    "keygen": ("export.cli.commands", "Make a pair of keys to sign bundles with."),
    "sign": ("export.cli.commands", "Sign a bundle."),
    "targets": ("export.cli.commands", "Every target: whether it compiles here, whether it runs here, and why not."),
    "bench": ("profiles.cli", "Measure a bundle on this machine."),
    "score": ("profiles.cli", "Score bundles of the sample models on their task."),
}
"""Commands of the layers beside this one: where each is, and what help says of it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ModelName = Annotated[
    str, typer.Option("--model", help="Name of the model, as the server lists it. Not needed with --bundle.")
]
Address = Annotated[str | None, typer.Option(help=f"Server to ask, HOST:PORT. Without --bundle: {ADDRESS}.")]
BundleFolder = Annotated[
    str | None,
    typer.Option(
        "--bundle", metavar="[NAME=]DIR", help="Run this bundle in process, without a server, under a name of your own."
    ),
]
Target = Annotated[str | None, typer.Option(help="Engine to run on, such as openvino. Default: the best usable one.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads per engine, 0 = all cores.")]
DeviceName = Annotated[
    str, typer.Option("--device", help="Device to run on, such as cpu, cuda:1, GPU.0 or HETERO:GPU,CPU.")
]
PlaceText = Annotated[
    str | None,
    typer.Option(
        "--place",
        help="Where submodels run, by name or role: SUBMODEL=TARGET[:DEVICE] or SUBMODEL=DEVICE, such as "
        "text_encoder=cpu,unet=cuda:0.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Memory that a model may take on each device, such as 4GiB: submodels take turns, pictures come in tiles."
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse engines that run a part of a submodel elsewhere than on its device.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say what each submodel ran on, in what numbers, and how long.")
]


@app.callback()
def enginecast() -> None:
    """Cast diffusion and vision-language models into compiled engines, and serve them."""


@app.command()
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]DIR...",
            help="Folders made by `enginecast build`. With a name, requests use that instead of the bundle's own: "
            "int8=DIR int4=DIR.",
        ),
    ],
    address: Annotated[
        str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one. There is no TLS: keep it private.")
    ] = ADDRESS,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    strict: Strict = False,
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC_KEY", help="Serve only bundles signed with this key's private half (a PEM file)."),
    ] = None,
    threads: Threads = 0,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait per model.")] = 16,
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that running requests get to finish when the server stops.")
    ] = 30.0,
) -> None:
    """Serve bundles over gRPC until SIGINT or SIGTERM."""
    import logging

    from runtime import limits
    from runtime.bundle import signing
    from runtime.placing.loading import load_model
    from serving.dialects.grpc import server
    from serving.host.models import ModelHost
    from serving.host.offers import Limits, Offer

    options, placing = _options(device, threads), _placing(place, memory_limit, strict)

    limits.GRACE.number("grace", grace)  # typer lets NaN pass
    if require_signature is not None:
        signing.public_key(require_signature)  # a wrong key fails at once
    offers = [Offer.of(root, name) for name, root in map(named, bundles)]
    if all(offer.error for offer in offers):
        raise next(offer.error for offer in offers if offer.error)

    def load(bundle: Bundle | Path, asked: str | None) -> Model:
        return load_model(bundle, asked or target, options, placing, require_signature)

    async def run() -> None:
        host = ModelHost(offers, load, Limits(max_queue=max_queue, grace_seconds=grace))
        await server.serve(host, address, lambda line: print(line, flush=True))

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run())


def named(text: str) -> tuple[str, Path]:
    """The name and the folder of `NAME=DIR`; no name for a folder alone. A folder with "=" in its name is written as
    ./a=b.
    """
    name, equals, folder = text.partition("=")
    if not equals or "/" in name or os.sep in name:
        return "", Path(text)
    if not name or not folder:
        raise InvalidInput("bundle", f"is '{text}', expected DIR or NAME=DIR")
    return name, Path(folder)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw. May be empty.")],
    out: Annotated[
        Path, typer.Option(help="PNG file to write; of several pictures, NAME-0.png, NAME-1.png and so on.")
    ],
    model: ModelName = "",
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Denoising steps.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=IMAGE_SEED.most,
            help="Seed of the noise, of further pictures 1 more each; the same one draws the same picture on the same "
            "engine.",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler by name, such as euler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, 0 to 1.")] = None,
    width: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Height in pixels.")] = None,
    images: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Number of pictures.")] = None,
    address: Address = None,
    bundle: BundleFolder = None,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    strict: Strict = False,
    threads: Threads = 0,
    verbose: Verbose = False,
) -> None:
    """Draw a picture from a prompt."""
    from serving.cli import terminal
    from serving.dialects.python.requests import ImageOptions, image_request

    terminal.check_output(out)
    given = ImageOptions(
        negative_prompt=None if negative_prompt is None else terminal.unicode("negative_prompt", negative_prompt),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        seed=seed,
        images=images,
    )
    request = image_request(terminal.unicode("prompt", prompt), given)
    options, placing = _options(device, threads), _placing(place, memory_limit, strict)
    with _session(address, model, bundle, target, options, placing, request) as session:
        for path in terminal.draw(session.draw(request), out, verbose):
            print(path)


@app.command()
def chat(
    model: ModelName = "",
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be repeated.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask. Without it: a conversation; /help lists its commands.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this joint probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens already seen become less likely.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=SEED.most, help="Seed of the sampling; the same one gives the same answer on the same engine."
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Above 1: search for the likeliest of so many answers.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With several beams: the larger, the longer the answers.")
    ] = None,
    address: Address = None,
    bundle: BundleFolder = None,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    strict: Strict = False,
    threads: Threads = 0,
    verbose: Verbose = False,
) -> None:
    """Ask about pictures, once or in a conversation."""
    from serving.cli import terminal
    from serving.cli.conversation import Conversation, typed
    from serving.dialects.python.requests import ChatOptions, Message, chat_request

    pictures = [terminal.read_image(path) for path in image or ()]
    given = ChatOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        beams=beams,
        length_penalty=length_penalty,
    )
    first = chat_request(terminal.unicode("prompt", prompt or "?"), pictures, given)
    options, placing = _options(device, threads), _placing(place, memory_limit, strict)
    with _session(address, model, bundle, target, options, placing, first) as session:

        def answer(messages: Sequence[Message]) -> str:
            return terminal.speak(session.chat_stream(messages, **given), verbose)

        talk = Conversation(pictures, answer)
        if prompt is not None:
            talk.ask(prompt)
            return
        if sys.stdin.isatty():
            terminal.errors.print(f"Ask {model or bundle}. /help lists commands, Ctrl-D ends.", markup=False)
        talk.run(typed(), patient=sys.stdin.isatty())


@app.command()
def devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Show where the submodels of this bundle would be loaded, and what they take.")
    ] = None,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    address: Annotated[
        str | None, typer.Option(help="Show what the models of the server at HOST:PORT really run on.")
    ] = None,
) -> None:
    """Devices of this machine, their features and memory; every target, whether it can be used here, and why not."""
    from serving.cli import overview

    given = {"target": target, "device": device, "place": place, "memory_limit": memory_limit}
    for name in (name for name, value in given.items() if value and bundle is None):
        raise InvalidInput(name, "belongs to --bundle: it says where the submodels of one are loaded")
    overview.show(overview.collect(bundle, target, device, _placing(place, memory_limit, False), address), as_json)


def _forward(context: typer.Context) -> None:
    """Run the command of the same name of another layer's typer app."""
    name = context.info_name or ""
    module, _ = FORWARDS[name]
    try:
        other: typer.Typer = importlib.import_module(module).app
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or module, "export") from None
    # get_group: an app of one command would otherwise take no command name
    typer.main.get_group(other)([name, *context.args], prog_name="enginecast")


for _name, (_, _help) in FORWARDS.items():
    app.command(_name, help=_help, context_settings=UNPARSED)(_forward)


@contextmanager
def _session(
    address: str | None,
    model: str,
    bundle: str | None,
    target: str | None,
    options: Options,
    placing: PlacementOptions,
    request: ImageRequest | ChatRequest,
) -> Iterator[Session]:
    """Where the requests go; `request` is the first one, or one like it, which is checked before a bundle is loaded."""
    opened: Session
    if bundle is None:
        given = {
            "target": target,
            "device": options.device,
            "place": placing.place,
            "memory_limit": placing.memory_limit,
            "strict": placing.strict,
            "threads": options.threads,
        }
        for name in (name for name, value in given.items() if value):
            option = name.replace("_", "-")
            raise InvalidInput(
                name, f"belongs to --bundle: what runs on a server is chosen by `enginecast serve --{option}`"
            )
        from serving.dialects.python.client import Client

        opened = Client(address or ADDRESS, model)
    elif model not in ("", named(bundle)[0]):
        raise InvalidInput("model", "and --bundle exclude each other: a bundle holds one model")
    elif address is not None:
        raise InvalidInput("address", "and --bundle exclude each other: ask a server, or run the bundle in process")
    else:
        from serving.dialects.python.model import open_for

        opened = open_for(named(bundle)[1], request, target, options, placing)
    with closing(opened):
        yield opened


def _options(device: str, threads: int) -> Options:
    from runtime.engine import Options

    return Options(device=device, threads=threads)


def _placing(place: str | None, memory_limit: str | None, strict: bool) -> PlacementOptions:
    from serving.dialects.python.model import placement

    return placement(place, memory_limit, strict)


def main() -> None:
    """The console script: a mistake of the user is one line on standard error and an exit code."""
    command.run(partial(app, prog_name="enginecast"))


if __name__ == "__main__":
    main()
