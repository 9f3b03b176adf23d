"""What is known of a model before it is asked: its task, and the facts that /show info lists."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from runtime.errors import BundleError, Unavailable
from runtime.placing.memory import show_size
from serving.cli.options import ADDRESS, ModelOptions
from serving.cli.repl.loop import About
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.task import grpc_tasks
from serving.enginecast_pb import model_pb2


def about(where: ModelOptions) -> About:
    """Reads the facts anew whenever it is called."""
    if where.bundle is None:
        return lambda: _of_server(where, _status(where))
    return partial(_of_bundle, where, where.bundle)


def task_of(where: ModelOptions) -> str:
    """The task of a model. Raises NotFound, BundleError, and Unavailable where no server answers."""
    if where.bundle is not None:
        return where.opened(where.bundle).manifest.task
    try:
        model = _status(where)
    except Unavailable as error:
        if where.address is not None:
            raise
        raise Unavailable(f"{error}. To run a bundle without a server, name its folder or its --repository") from None
    found = next((one.task for one in grpc_tasks().values() if one.kind == model.kind), None)
    if not model.kind or found is None:
        raise BundleError(model.error or f"the model {model.name} has a task that this program does not know")
    return found


def _status(where: ModelOptions) -> model_pb2.Model:
    with Client(where.address or ADDRESS, Connection(**where.connection())) as client:
        return client.model(where.model)


def _of_server(where: ModelOptions, model: model_pb2.Model) -> Mapping[str, str]:
    facts = {
        "model": model.name,
        "server": where.address or ADDRESS,
        "state": model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "quantization": model.quant,
        "engine": model.target,
        "device": model.device,
        "memory": show_size(sum(model.memory_bytes.values())) if model.memory_bytes else "",
        "notes": " ".join(model.notes),
    }
    return {name: value for name, value in facts.items() if value}


def _of_bundle(where: ModelOptions, text: str) -> Mapping[str, str]:
    bundle = where.opened(text)
    manifest = bundle.manifest
    sizes = (f"{one.name} {one.precision}, {show_size(one.nbytes)}" for one in manifest.submodels)
    facts = {
        "model": manifest.name,
        "bundle": str(bundle.root),
        "family": manifest.source.family,
        "source": manifest.source.name,
        "quantization": manifest.quant,
        "engines": ", ".join(sorted({one.target for one in manifest.artifacts})),
        "submodels": "; ".join(sizes),
    }
    return {name: value for name, value in facts.items() if value}
