from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from runtime.bundle import signing
from runtime.bundle.manifest import MANIFEST
from runtime.engine import Availability, FakeEngine
from runtime.placing.choices import Choice, Decision, Subject, decide
from serving.cli import commands as cli
from serving.cli import options
from serving.dialects.grpc.client import Client
from serving.dialects.python import model as in_process
from serving.enginecast_pb import model_pb2
from serving.host.offers import Limits
from tests.fakes.serving import FakeAnswers, FakeModel, FakeServer, bundle, until

ROOT = Path(__file__).parents[3]


class Result:
    """How a command ended: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["enginecast", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModel]:
    """The model that --bundle loads."""
    model = FakeModel()
    monkeypatch.setattr(in_process, "open_for", lambda *_: in_process.Model(model))
    yield model
    assert model.closed


class TestGenerate:
    def test_over_grpc(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        out = tmp_path / "x.png"
        ended = run(
            "generate",
            "--address",
            warm.address,
            "--model",
            "draw",
            "--prompt",
            "",
            "--out",
            str(out),
            "--steps",
            "2",
            "--seed",
            "9",
        )
        assert (ended.code, ended.out) == (0, f"{out}\n")
        assert re.fullmatch(r"seed 9, \d+\.\d s on fake\n", ended.err)
        with Image.open(out) as picture:
            assert picture.size == (16, 8)
        assert [path.name for path in tmp_path.glob("*.png*")] == ["x.png"]
        assert warm.draw.calls == 2

    def test_verbose(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        base = (
            "--address",
            warm.address,
            "--model",
            "draw",
            "--prompt",
            "x",
            "--out",
            f"{tmp_path}/x.png",
            "--steps",
            "2",
        )
        warm.draw.engine.decisions = {
            "attention": Decision("float32", "measured on this processor: 1.24 x as fast as the default")
        }
        lines = run("generate", *base, "-v").err.splitlines()
        assert len(lines) == 3 and re.fullmatch(
            r"  denoiser: 2 calls, \d\.\d\d s on none, int8 W8A8, float32", lines[1]
        )
        assert lines[2] == "    attention=float32: measured on this processor: 1.24 x as fast as the default"
        assert len(run("generate", *base).err.splitlines()) == 1

    def test_several_pictures(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        ended = run(
            "generate",
            "--address",
            warm.address,
            "--model",
            "draw",
            "--prompt",
            "x",
            "--out",
            f"{tmp_path}/x.png",
            "--images",
            "2",
        )
        assert ended.out.split() == [f"{tmp_path}/x-0.png", f"{tmp_path}/x-1.png"]

    def test_in_process(self, run: Any, local: FakeModel, tmp_path: Path) -> None:
        local.notes = ("one is replaced",)
        ended = run("generate", "--bundle", "somewhere", "--prompt", "x", "--out", f"{tmp_path}/x.png")
        assert (ended.code, ended.out) == (0, f"{tmp_path}/x.png\n")
        assert "\nnote: one is replaced\n" in ended.err
        assert local.calls == 4

    def test_what_the_environment_has_for_servers_is_allowed_beside_a_bundle(
        self, run: Any, local: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ENGINECAST_TOKEN", "ec_x")
        monkeypatch.setenv("ENGINECAST_TLS", "1")
        ended = run("generate", "--bundle", "somewhere", "--prompt", "x", "--out", f"{tmp_path}/x.png")
        assert ended.code == 0, ended.err
        assert run("generate", "--bundle", "x", "--token", "ec_y", "--prompt", "x", "--out", "x.png").code == 2

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--steps", "0"), 2, "enginecast: steps: is 0, expected 1 to 1000"),
            (("--model", "drow"), 3, "did you mean 'draw'"),
            (("--model", "talk"), 2, "talk has the task chat"),
            (("--target", "openvino"), 2, "target: belongs to --bundle"),
            (
                ("--memory-limit", "4GiB"),
                2,
                "memory_limit: belongs to --bundle: what runs on a server is chosen by `enginecast serve "
                "--memory-limit`",
            ),
            (("--strict",), 2, "strict: belongs to --bundle"),
            (("--place", "unet"), 2, "place: has 'unet', expected SUBMODEL=TARGET[:DEVICE]"),
            (
                ("--memory-limit", "4 elephants"),
                2,
                "memory_limit: is '4 elephants', expected a size above 0 such as 4GiB",
            ),
            (("--out", "x.jpg"), 2, "out: 'x.jpg' has no .png ending"),
            (("--out", "/nowhere/x.png"), 3, "folder /nowhere does not exist"),
            (("--threads", "2"), 2, "threads: belongs to --bundle"),
            (("--bundle", "/nowhere"), 2, "model: and --bundle exclude each other"),
            (("--seed", str(2**63)), 2, "Input should be less than or equal to 9223372036854775807"),
            (("--address", "127.0.0.1:1"), 10, "no server answers there"),
            (
                ("--bundle", "/nowhere", "--address", "127.0.0.1:1", "--model", ""),
                2,
                "address: and --bundle exclude each other",
            ),
            (("--bundle", "/nowhere", "--token", "ec_x", "--model", ""), 2, "token: and --bundle exclude each other"),
            (("--bundle", "/nowhere", "--ca", "ca.pem", "--model", ""), 2, "ca: and --bundle exclude each other"),
            (("--bundle", "/nowhere", "--tls", "--model", ""), 2, "tls: and --bundle exclude each other"),
            (("--bundle", "/nowhere", "--keep-alive", "5m"), 2, "keep_alive: and --bundle exclude each other"),
            (("--prompt", "\udcff"), 2, "prompt: is no valid UTF-8 text"),
        ],
    )
    def test_mistakes(
        self, run: Any, warm: FakeServer, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
    ) -> None:
        base = ("--address", warm.address, "--model", "draw", "--prompt", "x", "--out", str(tmp_path / "x.png"))
        ended = run("generate", *base, *arguments)
        assert ended.code == code, ended.err
        assert message in " ".join(ended.err.replace("│", "").split()) and (
            ended.err.count("\n") == 1 or "Usage:" in ended.err
        )
        assert not list(tmp_path.glob("*.png*"))

    def test_a_number_out_of_range_is_a_usage_error(self, run: Any, tmp_path: Path) -> None:
        assert run("generate", "--prompt", "x", "--out", "x.png", "--steps", "-1").code == 2

    def test_interrupting(self, warm: FakeServer, tmp_path: Path) -> None:
        warm.draw.hold()
        command = [
            "generate",
            "--address",
            warm.address,
            "--model",
            "draw",
            "--prompt",
            "x",
            "--out",
            str(tmp_path / "x.png"),
        ]
        with subprocess.Popen(
            [sys.executable, "-m", "serving.cli.commands", *command], stderr=subprocess.PIPE, text=True
        ) as process:
            until(lambda: warm.draw.calls == 1, 30)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr is not None and "Traceback" not in process.stderr.read()
        until(warm.leaving)
        warm.draw.release()
        assert warm.alive()


class TestChat:
    def test_one_question(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
        ended = run(
            "chat",
            "--address",
            warm.address,
            "--model",
            "talk",
            "--image",
            str(tmp_path / "p.png"),
            "--prompt",
            "what?",
        )
        assert (ended.code, ended.out) == (0, "a red círcle\n")
        assert "3 tokens" in ended.err

    def test_captions_are_a_line_for_each_picture(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "served").mkdir()
        with FakeServer(tmp_path / "served", Limits(slots=1, max_queue=8), ready=True) as roomy:
            self._captions(run, roomy, monkeypatch, tmp_path)

    def _captions(self, run: Any, warm: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        seen = []
        chat = FakeAnswers.pipeline

        def pipeline(self: FakeAnswers, request: Any) -> Any:
            seen.append([isinstance(part, str) for part in request.messages[0].content])
            return chat(self, request)

        monkeypatch.setattr(FakeAnswers, "pipeline", pipeline)
        paths = [str(tmp_path / f"{i}.png") for i in range(6)]
        for path in paths:
            Image.new("RGB", (8, 8)).save(path)
        where = "--address", warm.address, "--model", "talk"
        ended = run("caption", *paths, *where)
        assert (ended.code, ended.out) == (0, "".join(f"{path}\ta red círcle\n" for path in paths))
        assert run("caption", paths[0], *where, "--prompt", "what?", "--max-tokens", "1").out == f"{paths[0]}\ta\n"
        assert seen == [[False]] * 6 + [[False, True]]
        refused = run("caption", paths[0], "/nowhere.png", *where)
        assert refused.code == 3 and "picture /nowhere.png cannot be read" in refused.err and not refused.out
        for command in (("caption", paths[0]), ("chat", "--prompt", "what?")):
            for beams in ("0", "1000"):
                refused = run(*command, *where, "--beams", beams)
                assert refused.code == 2 and f"beams: is {beams}, expected 1 to 8" in refused.err and not refused.out

    def test_several_answers(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
        where = "--address", warm.address, "--model", "talk", "--answers", "2", "--temperature", "1"
        ended = run("caption", str(tmp_path / "p.png"), *where)
        assert ended.out == f"{tmp_path}/p.png\ta red círcle\n" * 2
        ended = run("chat", "--prompt", "what?", *where)
        assert ended.out == "a red círcle\n\na red círcle\n" and "2 answers, 6 tokens" in ended.err

    def test_conversation(self, warm: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        chat = FakeAnswers.pipeline

        def pipeline(self: FakeAnswers, request: Any) -> Any:
            seen.append([(turn.role, turn.content) for turn in request.messages])
            return chat(self, request)

        monkeypatch.setattr(FakeAnswers, "pipeline", pipeline)
        ended = CliRunner().invoke(
            cli.app, ["chat", "--address", warm.address, "--model", "talk"], input="what?\nsure?\n\n"
        )
        assert ended.exit_code == 0, ended.output
        first = ("user", ("what?",))
        assert seen == [[first], [first, ("assistant", ("a red círcle",)), ("user", ("sure?",))]]

    def test_commands_of_a_conversation(
        self, warm: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        seen = []
        chat = FakeAnswers.pipeline

        def pipeline(self: FakeAnswers, request: Any) -> Any:
            seen.append([len(turn.content) for turn in request.messages])
            return chat(self, request)

        monkeypatch.setattr(FakeAnswers, "pipeline", pipeline)
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
        typed = f"/help\n/image {tmp_path}/p.png\nwhat?\nsure?\n/clear\nwho?\nquit\nno more\n"
        ended = CliRunner().invoke(cli.app, ["chat", "--address", warm.address, "--model", "talk"], input=typed)
        assert ended.exit_code == 0, ended.output
        assert seen == [[2], [2, 1, 1], [1]], "commands and quit are none of the model's"
        assert "/clear " in ended.stderr and ended.stdout == "a red círcle\n" * 3

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/imge x", "/imge: is no command: did you mean '/image'? (known: /bye, /clear, /exit, /help, /image, "),
            ("/image", "/image: needs the PATH of a picture"),
            ("/image /nowhere.png", "picture /nowhere.png cannot be read: No such file"),
        ],
    )
    def test_wrong_commands(self, warm: FakeServer, line: str, message: str) -> None:
        ended = CliRunner().invoke(cli.app, ["chat", "--address", warm.address, "--model", "talk"], input=f"{line}\n")
        assert message in str(ended.exception) and not ended.stdout

    def test_at_a_terminal(self, warm: FakeServer) -> None:
        """A banner, errors that do not end the conversation, and one short line behind each answer."""
        command = [sys.executable, "-m", "serving.cli.commands", "chat", "--address", warm.address, "--model", "talk"]
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True
        ) as process:
            os.close(theirs)
            shown = b""

            def wait_for(text: bytes) -> None:
                nonlocal shown
                while text not in shown:
                    shown += os.read(ours, 1000)

            wait_for(b"Ask talk. /help lists commands, Ctrl-D ends.")
            wait_for(b"> ")
            os.write(ours, b"/imge x\nwhat?\n")
            wait_for(b"is no command")
            wait_for(b"s on fake")
            os.write(ours, b"/quit\n")
            assert process.wait(20) == 0
        os.close(ours)
        text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode().replace("\r", "")
        assert re.search(r"\na red círcle\n3 tokens, \d\.\d s on fake\n", text) and "fork" not in text, text

    def test_no_picture(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "fox.txt").write_text("a red fox")
        ended = run("chat", "--image", f"{tmp_path}/fox.txt", "--prompt", "what?")
        assert ended.code == 2 and f"enginecast: {tmp_path}/fox.txt: is no PNG" in ended.err, (
            "the file is named, not a field"
        )
        assert run("chat", "--image", str(tmp_path), "--prompt", "what?").code == 3

    def test_a_missing_picture(self, run: Any) -> None:
        ended = run("chat", "--image", "/nowhere.png", "--prompt", "what?")
        assert (ended.code, ended.err) == (
            3,
            "enginecast: picture /nowhere.png cannot be read: No such file or directory\n",
        )

    def test_in_process_wrong_kind(self, run: Any, local: FakeModel) -> None:
        ended = run("chat", "--bundle", "somewhere", "--prompt", "what?")
        assert ended.code == 2 and "has the task image, expected chat: use `generate`" in ended.err


class TestServe:
    def test_mistakes(self, run: Any, warm: FakeServer, tmp_path: Path) -> None:
        root = str(bundle(tmp_path, "empty").root)
        assert run("serve", "/nowhere").code == 3
        assert run("serve", str(tmp_path)).code == 6
        assert "both called" in run("serve", root, root).err
        in_use = run("serve", root, "--address", warm.address)
        assert in_use.code == 10 and "in use" in in_use.err
        assert run("serve", root, "--address", "nonsense").code == 2
        assert run("serve", root, "--memory-limit", "lots").code == 2

    def test_names_of_its_own(self, run: Any, tmp_path: Path) -> None:
        root = str(bundle(tmp_path, "twin").root)
        advice = run("serve", root, root)
        assert advice.code == 2 and f"enginecast serve twin={root} twin-2={root}" in advice.err
        assert "both called 'a'" in run("serve", f"a={root}", f"a={root}").err
        assert run("serve", f"={root}").code == run("serve", "a=").code == 2
        assert options.named(f"int8={root}") == ("int8", Path(root))
        assert options.named("./a=b") == ("", Path("a=b")) and options.named("/x/a=b") == ("", Path("/x/a=b"))

    @pytest.mark.parametrize("grace", ["nan", "inf", "1e9", "-1"])
    def test_a_grace_period_out_of_range(self, run: Any, tmp_path: Path, grace: str) -> None:
        assert run("serve", str(bundle(tmp_path, "draw").root), "--grace", grace).code == 2

    def test_one_damaged_bundle_of_several(self, tmp_path: Path) -> None:
        """The rest is served. Of two that are damaged one cannot be opened, the other not be loaded."""
        for name in ("good", "broken", "altered"):
            bundle(tmp_path, name)
        (tmp_path / "broken" / MANIFEST).write_text("{")
        program = (
            "import sys, serving.cli.commands, runtime.placing.loading; from pathlib import Path; from runtime.errors "
            "import BundleError\n"
            "from tests.fakes.serving import FakeModel\n"
            "def load(bundle, *_):\n"
            "    root = bundle if isinstance(bundle, Path) else bundle.root\n"
            "    if root.name != 'good': raise BundleError(f'bundle {root} is damaged')\n"
            "    return FakeModel()\n"
            "runtime.placing.loading.begin_model = load; serving.cli.commands.main()"
        )
        roots = [str(tmp_path / name) for name in ("good", "broken", "altered")]
        command = [sys.executable, "-c", program, "serve", *roots, "--address", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            address = process.stdout.readline().split()[-1]
            said = [process.stdout.readline() for _ in range(3)]
            assert "good is ready on fake (none)\n" in said and sum(str(tmp_path) in line for line in said) == 2, said
            with Client(address) as client:
                models = {model.name: model for model in client.models()}
                assert {name: model.state for name, model in models.items()} == {
                    "good": model_pb2.MODEL_STATE_READY, "broken": model_pb2.MODEL_STATE_FAILED,
                    "altered": model_pb2.MODEL_STATE_FAILED,
                }  # fmt: skip
                assert (
                    models["altered"].error == "bundle altered is damaged"
                    and str(tmp_path) not in models["broken"].error
                )
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()

    def test_none_that_can_be_served(self, run: Any, tmp_path: Path) -> None:
        roots = [str(bundle(tmp_path, name).root) for name in ("a", "b")]
        ended = run("serve", *roots, "--address", "127.0.0.1:0")  # their pipeline does not exist
        assert ended.code == 6 and "needs the pipeline 'fake'" in ended.err and "Traceback" not in ended.err

    def test_only_signed_bundles(self, run: Any, tmp_path: Path) -> None:
        private, public = tmp_path / "key.pem", tmp_path / "key.pub"
        signing.generate(private, public)
        unsigned = bundle(tmp_path, "unsigned")
        ended = run("serve", str(unsigned.root), "--address", "127.0.0.1:0", "--require-signature", str(public))
        assert ended.code == 6 and "is not signed, and a signature is required" in ended.err
        signing.sign(unsigned, private)
        ended = run("serve", str(unsigned.root), "--address", "127.0.0.1:0", "--require-signature", str(public))
        assert "needs the pipeline 'fake'" in ended.err, "the signature is good; there is nothing to run"


class TestDevices:
    @pytest.fixture(autouse=True)
    def made_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken(FakeEngine):
            target = "broken"

            @classmethod
            def available(cls) -> Availability:
                return Availability(False, reason="no such device: [extra]")

        monkeypatch.setattr("serving.cli.overview.targets", lambda: {"fake": FakeEngine, "broken": Broken})

    def test_says_why_not(self, run: Any) -> None:
        ended = run("devices")
        rows = {line.split("│")[1].strip(): line for line in ended.out.splitlines() if "│" in line}
        assert "yes" in rows["fake"] and "no such device: [extra]" in rows["broken"] and "GiB" in rows["cpu"]

    def test_json(self, run: Any) -> None:
        found = json.loads(run("devices", "--json").out)
        assert [(one["target"], one["usable"], one["reason"]) for one in found["targets"]] == [
            ("fake", True, ""), ("broken", False, "no such device: [extra]"),
        ]  # fmt: skip
        host = found["devices"][0]
        assert (
            (host["name"], host["kind"]) == ("cpu", "cpu")
            and host["memory"] > host["free"] > 0
            and found["processors"] > 0
        )

    def test_what_was_chosen_for_the_processor(self, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """In a cache of its own, where the default is planted to take twice as long."""
        monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
        monkeypatch.delenv("ENGINECAST_CHOICES")
        monkeypatch.setattr("runtime.placing.choices.seconds", lambda part: part())
        monkeypatch.setattr(FakeEngine, "choices", {"attention": ("bfloat16", "float32")})
        assert json.loads(run("devices", "--json").out)["choices"] == []
        taken = {"bfloat16": 2.0, "float32": 1.0}
        choice, subject = Choice("attention", ("bfloat16", "float32")), Subject("denoiser", "fake", "", "key")
        decide([choice], subject, lambda values: lambda: taken[values["attention"]], {})
        (found,) = json.loads(run("devices", "--json").out)["choices"]
        assert (found["target"], found["submodel"], found["choice"]) == ("fake", "denoiser", "attention=float32")
        assert found["why"] == "measured on this processor: 2.00 x as fast as the default"
        assert "attention=float32" in run("devices").out

    def test_of_a_server(self, run: Any, warm: FakeServer) -> None:
        warm.draw.notes = ("it did not fit",)
        warm.draw.engine.decisions = {"attention": Decision("float32", "as set")}
        found = json.loads(run("devices", "--json", "--address", warm.address).out)
        assert found["models"][0] == {
            "model": "draw", "submodel": "denoiser", "target": "fake", "device": "none",
            "precision": "int8 W8A8, float32", "fallbacks": [],
            "choices": ["attention=float32: as set"],
        }  # fmt: skip
        assert "draw: it did not fit" in found["notes"]
        assert run("devices", "--address", "127.0.0.1:1").code == 10

    @pytest.mark.parametrize("option", ["--target", "--device", "--place", "--memory-limit"])
    def test_options_of_a_bundle(self, run: Any, option: str) -> None:
        value = {"--place": "unet=cpu", "--memory-limit": "1GiB"}.get(option, "cpu")
        ended = run("devices", option, value)
        assert ended.code == 2 and "belongs to --bundle" in ended.err

    def test_of_a_bundle(self, run: Any, tmp_path: Path) -> None:
        root = bundle(tmp_path, "placed").root
        manifest = json.loads((root / MANIFEST).read_bytes())
        parts = {"signature": {"inputs": [], "outputs": []}, "graph": "g", "precision": {"weights": ["int8"]}}
        names = ("vision_encoder", "decoder")
        manifest["submodels"] = [parts | {"name": name, "nbytes": 1000} for name in names]
        manifest["artifacts"] = [{"target": "onnxruntime", "submodel": name} for name in names]
        (root / MANIFEST).write_text(json.dumps(manifest))
        found = json.loads(run("devices", "--json", "--bundle", str(root), "--place", "decoder=cpu").out)
        assert [(row["submodel"], row["place"], row["memory of"]) for row in found["placement"]] == [
            (name, "onnxruntime:CPUExecutionProvider", "cpu") for name in names
        ]
        assert all(row["needs"] > 1000 for row in found["placement"])
        ended = run("devices", "--bundle", str(root), "--place", "decodr=cpu")
        assert ended.code == 2 and "did you mean 'decoder'" in ended.err


class TestForwarding:
    def test_help_of_another_layer(self, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "other_cli.py").write_text(
            "import typer\napp = typer.Typer()\n@app.command()\ndef bench(source: str, fast: bool = False): "
            "print(source, fast)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(cli.FORWARDS, "bench", ("other_cli", ""))
        assert run("bench", "x", "--fast").out == "x True\n"
        assert "SOURCE" in run("bench", "--help").out.upper()
        assert run("bench", "--nonsense").code == 2

    def test_a_layer_that_is_not_installed(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(cli.FORWARDS, "build", ("not_there", ""))
        ended = run("build")
        assert ended.code == 8 and "pip install 'enginecast[export]'" in ended.err


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from serving.cli.commands import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'onnxruntime', 'openvino', 'grpc', 'numpy', 'export', 'profiles'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    environment = os.environ | {"COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert ended.stderr == "[]\n"
    commands = ("serve", "generate", "chat", "caption", "embed", "devices", "build", "inspect", "verify", "bench")
    assert all(f"  {command} " in ended.stdout for command in commands)
