"""Tokens over real gRPC: who is admitted to what, how often, and what the audit log has of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

import enginecast
from runtime.errors import InvalidInput, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated
from serving import enginecast_pb
from serving.cli import commands as cli
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.task import grpc_tasks
from serving.dialects.http.dialect import dialects
from serving.enginecast_pb import image_pb2_grpc
from serving.host.offers import Limits
from serving.security import tokens
from serving.security.audit import Audit
from serving.security.gate import Gate, Usage
from serving.security.protection import Security
from serving.security.scopes import ANY, INFERRING, OPEN, READING, Scope, is_management, required
from serving.security.tokens import Token, find, new, read, remove
from tests.fakes.certificates import Authority
from tests.fakes.proofs import fields
from tests.fakes.serving import FakeServer, request, until

Give = Callable[..., Client]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text("# who may call\n")
    return path


@pytest.fixture
def server(tmp_path: Path, file: Path) -> Iterator[FakeServer]:
    """A server with tokens and an audit log, whose models are ready."""
    (tmp_path / "bundles").mkdir()
    audit = Audit(tmp_path / "audit.jsonl")
    server = FakeServer(
        tmp_path / "bundles", Limits(slots=1, max_queue=8), security=Security(gate=Gate(file)), observers=[audit]
    )
    for name in server.models:
        server.do(server.host.load(name))
    yield server
    server.end()


@pytest.fixture
def give(server: FakeServer, file: Path) -> Iterator[Give]:
    """Makes a token and connects with it."""
    clients = []

    def made(name: str, *scopes: Scope, per_minute: int | None = None, concurrent: int | None = None) -> Client:
        secret = new(file, name, frozenset(scopes), per_minute, concurrent)
        clients.append(Client(server.address, Connection(token=secret)))
        return clients[-1]

    yield made
    for client in clients:
        client.close()


def drawn(client: Client) -> bool:
    return list(client.generate(request(steps=1)))[-1].HasField("done")


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_token_no_call(server: FakeServer) -> None:
    for call in (server.client.models, lambda: drawn(server.client), lambda: server.client.load("draw")):
        with pytest.raises(Unauthenticated, match="a token is required"):
            call()
    client = Client(server.address, Connection(token="ec_" + "x" * 43))
    with client, pytest.raises(Unauthenticated, match="is not known here"):
        client.models()


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic eDp5", "ec_x", "Bearer a b", "bearer  ", "Basic ?", "Basic /w=="]
)
def test_headers_that_hold_no_token(server: FakeServer, header: str) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        list(stub.Generate(request(), metadata=(("authorization", header),)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_needs_none(server: FakeServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert next(iter(stub.Watch(health_pb2.HealthCheckRequest()))).status == health_pb2.HealthCheckResponse.SERVING


def test_each_scope_opens_its_calls(server: FakeServer, give: Give) -> None:
    infer, manage, metrics = give("i", Scope.INFER), give("m", Scope.MANAGE), give("x", Scope.METRICS)
    assert drawn(infer) and manage.load("draw").name == "draw"
    for client in (infer, manage, metrics):
        assert len(client.models()) == 2
    for client in (manage, metrics):
        with pytest.raises(PermissionDenied, match="this call needs infer"):
            drawn(client)
    for client in (infer, metrics):
        with pytest.raises(PermissionDenied, match="this call needs manage"):
            client.unload("draw")
    assert drawn(infer), "nothing was unloaded"


def test_every_method_has_its_scope() -> None:
    modules = [import_module(f"serving.enginecast_pb.{found.name}") for found in iter_modules(enginecast_pb.__path__)]
    files = [module.DESCRIPTOR for module in (*modules, health_pb2) if hasattr(module, "DESCRIPTOR")]
    services = [service for file in files for service in file.services_by_name.values()]
    methods = {f"{one.containing_service.full_name}/{one.name}" for service in services for one in service.methods}
    listed = {method for method in OPEN | READING | INFERRING if "Reflection" not in method}
    over_http = {
        f"{dialect.name}/{row.endpoint.replace('WebSocket', 'WS')}" for dialect in dialects() for row in fields(dialect)
    }
    assert listed <= methods | over_http | {"http/GET /", "http/HEAD /"}
    tasks = {f"{task.service.full_name}/{task.method.name}" for task in grpc_tasks().values()}
    assert all(required(method) == {Scope.INFER} for method in tasks if method.startswith("enginecast.v1."))
    managing = {method for method in methods if is_management(method)}
    assert {method.partition("/")[2] for method in managing} >= {
        "LoadModel", "UnloadModel", "RepositoryModelLoad", "RepositoryModelUnload",
    }  # fmt: skip
    assert not any(word in method for method in methods - managing for word in ("Load", "Unload"))
    assert required("enginecast.v1.ModelService/Anything") == {Scope.MANAGE} and set(Scope) == ANY


def test_tokens_change_without_a_restart(
    server: FakeServer, give: Give, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = give("old", Scope.INFER)
    assert len(old.models()) == 2
    before = file.read_text()
    young = give("young", Scope.INFER)
    assert len(young.models()) == 2
    file.write_text("[[token]]\nnonsense")
    caplog.clear()
    assert len(young.models()) == len(old.models()) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    file.write_text(before)
    assert len(old.models()) == 2
    with pytest.raises(Unauthenticated):
        young.models()


def test_requests_per_minute(server: FakeServer, give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    client, other = give("few", Scope.INFER, per_minute=2), give("other", Scope.INFER)
    assert drawn(client) and len(client.models()) == 2
    with pytest.raises(ResourceExhausted, match="2 requests a minute") as caught:
        client.models()
    assert caught.value.retry_seconds is not None and 50 < caught.value.retry_seconds <= 60
    assert drawn(other)
    monkeypatch.setattr("serving.security.gate.MINUTE", 0.05)
    time.sleep(0.06)
    assert drawn(client), "the minute is over"


def test_calls_at_once(server: FakeServer, give: Give) -> None:
    client = give("one", Scope.INFER, concurrent=1)
    server.draw.hold()
    running = client.generate(request(steps=1))
    next(running)
    with pytest.raises(ResourceExhausted, match="1 calls at once") as caught:
        client.models()
    assert caught.value.retry_seconds == 1
    server.draw.release()
    assert list(running)[-1].HasField("done")
    assert drawn(client)


def test_a_refused_call_takes_no_place() -> None:
    usage, token = Usage(), Token(name="a", sha256="0" * 64, scopes=frozenset({Scope.INFER}), concurrent=1)
    with usage.call(token), suppress(ResourceExhausted), usage.call(token):
        raise AssertionError("it was admitted")
    with usage.call(token):
        pass


def test_a_token_is_one_client_for_the_queue(server: FakeServer, give: Give) -> None:
    """The last places of a queue are kept for others: two connections with one token are one client."""
    first, other = give("busy", Scope.INFER), give("other", Scope.INFER)
    secret = first._metadata[0][1].removeprefix("Bearer ")
    server.draw.hold()
    with Client(server.address, Connection(token=secret)) as second:
        running = []
        for client in (first, second) * 3 + (first,):
            running.append(client.generate(request(steps=1)))
            next(running[-1])
        with pytest.raises(ResourceExhausted, match="kept for other clients"):
            next(second.generate(request(steps=1)))
        waiting = other.generate(request(steps=1))
        assert next(waiting).HasField("queued")
        server.draw.release()
        assert all(list(one)[-1].HasField("done") for one in (*running, waiting))


def test_the_audit_log(server: FakeServer, give: Give, tmp_path: Path) -> None:
    manage, infer = give("boss", Scope.MANAGE), give("guest", Scope.INFER)
    manage.unload("draw", 0)
    manage.load("draw")
    drawn(infer)
    infer.models()
    with pytest.raises(PermissionDenied):
        infer.unload("draw")
    with pytest.raises(Unauthenticated):
        server.client.load("draw")
    with pytest.raises(NotFound):
        manage.load("x" * 5000)
    until(lambda: len(log_of(tmp_path / "audit.jsonl")) == 5)
    entries = log_of(tmp_path / "audit.jsonl")
    assert [(one["client"], one["method"].partition("/")[2], one["code"], one["error"]) for one in entries] == [
        ("boss", "UnloadModel", "OK", ""),
        ("boss", "LoadModel", "OK", ""),
        ("guest", "UnloadModel", "PERMISSION_DENIED", "PermissionDenied"),
        (entries[3]["peer"], "LoadModel", "UNAUTHENTICATED", "Unauthenticated"),
        ("boss", "LoadModel", "NOT_FOUND", "NotFound"),
    ]
    assert json.loads(entries[0]["request"]) == {"name": "draw", "grace_seconds": 0.0}
    assert entries[2]["request"] == "" and len(entries[4]["request"]) < 100
    assert all(one["id"] and one["peer"].startswith("ipv4:") and one["time"] for one in entries)
    assert "ec_" not in (tmp_path / "audit.jsonl").read_text()


def test_an_audit_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises((InvalidInput, NotFound), match="nowhere"):
        Audit(tmp_path / "nowhere" / "audit.jsonl")


def test_the_name_in_a_certificate_is_the_client(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files, own = authority.issue("server"), authority.issue("alice")
    tls = type(files)(files.cert, files.key, authority.path)
    audit = Audit(tmp_path / "audit.jsonl")
    (tmp_path / "bundles").mkdir()
    connection = Connection(authority.path, own.cert, own.key)
    with FakeServer(tmp_path / "bundles", security=Security(tls), connection=connection, observers=[audit]) as server:
        server.load_all()
        assert server.alive()
    assert {one["client"] for one in log_of(tmp_path / "audit.jsonl")} == {"'alice'"}


def test_only_hashes_are_stored(file: Path) -> None:
    secret = new(file, "alice", frozenset({Scope.INFER}), 60, None)
    assert secret.startswith("ec_") and len(secret) == 46 and secret not in file.read_text()
    (token,) = read(file)
    assert token == Token(name="alice", sha256=token.sha256, scopes=frozenset({Scope.INFER}), requests_per_minute=60)
    assert find((token,), secret) is token and find((token,), secret + "x") is None and find((), secret) is None
    fresh = file.with_name("fresh.toml")
    new(fresh, "b", frozenset(Scope), None, None)
    assert fresh.stat().st_mode & 0o777 == 0o600 and read(fresh)[0].scopes == set(Scope)
    assert new(file, "c", frozenset(Scope), None, None) != secret and len(read(file)) == 2


def test_comparisons_take_the_same_time_for_every_hash(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [new(file, name, frozenset({Scope.INFER}), None, None) for name in "abc"]
    compared = []
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda one, two: compared.append(one) or one == two)
    for secret in (*secrets, "wrong"):
        compared.clear()
        find(read(file), secret)
        assert len(compared) == 3


GOOD = f'name = "a"\nsha256 = "{"0" * 64}"\nscopes = ["infer"]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[token]]\n", "no file of tokens: token.0.name: Field required"),
        (f"[[token]]\n{GOOD}secret = 1\n", "token.0.secret: Extra"),
        (f"[[tokens]]\n{GOOD}", "tokens: Extra"),
        (f"[[token]]\n{GOOD.replace('infer', 'all')}", r"token.0.scopes.0: "),
        ("[[token]]\n" + GOOD.replace('"infer"', ""), r"token.0.scopes: "),
        (f"[[token]]\n{GOOD.replace('000', 'xyz')}", "token.0.sha256"),
        (f"[[token]]\n{GOOD}concurrent = 0\n", "token.0.concurrent"),
        (f"[[token]]\n{GOOD}requests_per_minute = true\nname = 2", "no TOML file"),
        (f"[[token]]\n{GOOD}[[token]]\n{GOOD}", "has the name a twice"),
        (f"[[token]]\n{GOOD}[[token]]\n" + GOOD.replace('"a"', '"b"'), "has the sha256 0+ twice"),
        ("\0", "no TOML file"),
    ],
)
def test_files_that_are_damaged(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        Gate(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Gate(tmp_path / "nothing")


def test_tokens_need_tls_outside_of_this_machine(file: Path) -> None:
    with pytest.raises(InvalidInput, match="unencrypted"):
        Security(insecure=True, gate=Gate(file)).check("0.0.0.0:1")
    Security(gate=Gate(file)).check("127.0.0.1:1")


def test_commands(server: FakeServer, file: Path) -> None:
    run = CliRunner().invoke
    made = run(cli.app, ["token", "new", "alice", "--scope", "infer", "--concurrent", "2", "--tokens", str(file)])
    assert made.exit_code == 0, made.output
    (token,) = read(file)
    assert (token.name, token.concurrent, token.scopes) == ("alice", 2, {Scope.INFER})
    secret = made.stdout.strip()
    ask = ["chat", "--address", server.address, "--model", "talk", "--prompt", "what?"]
    assert isinstance(run(cli.app, ask).exception, Unauthenticated)
    assert run(cli.app, [*ask, "--token", secret]).exit_code == 0
    assert run(cli.app, ask, env={"ENGINECAST_TOKEN": secret}).exit_code == 0
    again = run(cli.app, ["token", "new", "alice", "--scope", "infer"], env={"ENGINECAST_SERVE_TOKENS": str(file)})
    assert isinstance(again.exception, InvalidInput) and "already" in str(again.exception)
    for wrong in (["a b"], ["b", "--concurrent", "0"], ["b", "--requests-per-minute", "1000000"]):
        ended = run(cli.app, ["token", "new", *wrong, "--scope", "infer", "--tokens", str(file)])
        assert isinstance(ended.exception, InvalidInput), ended.output
    assert len(read(file)) == 1


def test_removing_a_token(file: Path) -> None:
    for name in ("alice", "bob", "carol"):
        new(file, name, frozenset({Scope.INFER}), None, None)
    file.write_text(file.read_text().replace('name = "bob"\n', '# until spring\nname = "bob"\n'))
    file.chmod(0o640)
    run, secret = CliRunner().invoke, new(file, "dora", frozenset({Scope.MANAGE}), None, None)
    ended = run(cli.app, ["token", "remove", "bob", "--tokens", str(file)])
    assert ended.exit_code == 0 and "bob is no longer in" in ended.stdout
    assert [token.name for token in read(file)] == ["alice", "carol", "dora"]
    assert find(read(file), secret) == read(file)[2]
    assert file.read_text().startswith("# who may call\n") and "# until spring\n" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o640
    again = run(cli.app, ["token", "remove", "bob", "--tokens", str(file)])
    assert isinstance(again.exception, NotFound) and "known: alice, carol, dora" in str(again.exception)


def test_a_token_in_another_form_is_not_removed(file: Path) -> None:
    file.write_text(f'token = [{{name = "alice", sha256 = "{"0" * 64}", scopes = ["infer"]}}]\n')
    with pytest.raises(InvalidInput, match="remove it in an editor"):
        remove(file, "alice")
    assert len(read(file)) == 1


def test_a_removed_token_is_refused_at_once(server: FakeServer, give: Give, file: Path) -> None:
    client, other = give("alice", Scope.INFER), give("bob", Scope.INFER)
    assert drawn(client)
    remove(file, "alice")
    with pytest.raises(Unauthenticated):
        drawn(client)
    assert drawn(other)


def test_python_clients(server: FakeServer, file: Path) -> None:
    secret = new(file, "alice", frozenset({Scope.INFER}), 3, None)
    with enginecast.Client(server.address, "draw", token=secret) as client:
        assert client.generate("a circle", steps=1).done.engines
        assert len(client.models()) == 2
        with pytest.raises(enginecast.PermissionDenied):
            client.unload()
