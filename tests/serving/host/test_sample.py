"""A real model that is loaded for requests, unloaded for another and replaced while it answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runtime.bundle.manifest import Bundle
from runtime.language.text import Message
from runtime.placing.devices import detect
from runtime.placing.loading import load_model
from runtime.placing.placement import PlacementOptions, caches, needs
from runtime.tasks.chat import ChatRequest, TextDelta
from serving.dialects.grpc.health import health_of
from serving.host.loading import Loader
from serving.host.models import ModelHost
from serving.host.repository import Repository
from serving.host.residency import Memory, Needs
from serving.host.states import ModelState
from serving.host.warming import warmed

TARGET = "onnxruntime"


def load(bundle: Bundle, target: str | None) -> object:
    return load_model(bundle, TARGET)


def estimate(bundle: Bundle, target: str | None) -> Needs:
    where = bundle, TARGET, "", PlacementOptions(), detect()
    return Needs(needs(*where), caches(*where))


async def answer(host: ModelHost, name: str, tokens: int = 8) -> str:
    request = ChatRequest((Message("user", ("what is it?",)),), max_tokens=tokens, temperature=0.0)
    events = [event async for event in host.run(name, request, 60)]
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_models_share_the_memory_for_one(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tiny_bundle)
    need = estimate(Bundle(tiny_bundle), None).all["cpu"]
    loader: Loader = warmed(load)  # type: ignore[arg-type]  # a LoadedModel is a Model

    async def work() -> None:
        host = ModelHost([], loader, memory=Memory(need, estimate))
        host.follow(Repository(tmp_path))
        assert health_of(host)[""] and not host.status("a").memory, "a request would load it"
        first = await asyncio.gather(*(answer(host, "a") for _ in range(8)))
        assert len(first[0]) > 0 and set(first) == {first[0]}
        assert await answer(host, "b") == first[0]
        states = {name: host.status(name).state for name in ("a", "b")}
        assert states == {"a": ModelState.UNLOADED, "b": ModelState.READY}
        assert 0 < host.status("b").memory["cpu"] <= 2 * need
        assert await host.close(5)

    asyncio.run(work())


def test_it_is_replaced_while_it_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tiny_bundle)
    made: list[object] = []

    def counted(bundle: Bundle, target: str | None) -> object:
        made.append(load(bundle, target))
        return made[-1]

    async def work() -> None:
        host = ModelHost([], counted)  # type: ignore[arg-type]  # a LoadedModel is a Model
        host.follow(Repository(tmp_path))
        expected = await answer(host, "a", 30)
        answering = [asyncio.create_task(answer(host, "a", 30)) for _ in range(4)]
        await host.reload("a")
        answering += [asyncio.create_task(answer(host, "a", 30)) for _ in range(4)]
        assert set(await asyncio.gather(*answering)) == {expected} and len(made) == 2
        assert await host.close(5)

    asyncio.run(work())
