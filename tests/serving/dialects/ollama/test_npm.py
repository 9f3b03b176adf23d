"""The npm package "ollama", unchanged, against a real server."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.language.grammar import Grammar
from runtime.vision.images import decode_image, encode_image
from serving.host import building
from tests.fakes.npm import installed
from tests.fakes.serving import note_requests
from tests.serving.dialects.ollama.test_storing import BUILD, filled, storing

PACKAGE = b'{"private": true, "dependencies": {"ollama": "0.6.4"}}'
PICTURE = encode_image(np.full((4, 6, 3), 200, np.uint8))


def test_the_package_works_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = installed(PACKAGE)
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    monkeypatch.setattr(building, "COMMAND", (sys.executable, str(script)))
    filled(tmp_path / "checkpoints", "good")
    filled(tmp_path / "library", "shapes/1", a=b"x")
    with storing(tmp_path, library=tmp_path / "library", checkpoints=tmp_path / "checkpoints") as served:
        for model in served.fake.models.values():
            note_requests(model, served.requests)
        text = (Path(__file__).parent / "client.mjs").read_text()
        command = ["node", "--input-type=module", "-", f"http://127.0.0.1:{served.server.port}"]
        command.append(base64.b64encode(PICTURE).decode())
        done = subprocess.run(
            command, input=text, cwd=packages, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        check(json.loads(done.stdout), served.requests, served.fake.draw.picture)


def check(found: dict[str, Any], requests: list[Any], picture: Any) -> None:
    """What the script printed, and the requests that the models got."""
    assert [model["name"] for model in found["tags"]["models"]] == ["draw:latest", "talk:latest"]
    assert found["chat"]["message"] == {"role": "assistant", "content": "a red círcle"}
    assert (found["chat"]["done"], found["chat"]["eval_count"]) == (True, 3) and found["chat"]["total_duration"] > 0
    assert [piece["message"]["content"] for piece in found["stream"]] == ["a ", "red ", "círcle", ""]
    assert (found["generate"]["response"], found["loaded"]["done_reason"]) == ("a red círcle", "load")
    assert [piece.get("completed") for piece in found["drawn"]] == [1, 2, None]
    assert np.array_equal(decode_image(base64.b64decode(found["drawn"][-1]["image"])), picture)
    assert [model["name"] for model in found["ps"]["models"]] == ["draw:latest", "talk:latest"]
    assert found["show"]["capabilities"] == ["completion"]
    assert [step["status"] for step in found["pulled"]][:: len(found["pulled"]) - 1] == ["pulling manifest", "success"]
    for name in ("pulledAgain", "copied", "created", "deleted"):
        assert found[name] == {"status": "success"}
    assert found["left"] == ["draw:latest", "made:latest", "shapes:1", "shapes:latest", "talk:latest"]
    assert found["unknown"]["status"] == 404 and "did you mean 'talk'" in found["unknown"]["message"]
    assert found["tools"] == {"message": "tools[0].function: is missing, and is required", "status": 400}
    assert found["embed"]["status"] == 400 and found["before"] == "a "
    assert requests[0].images[0].data == PICTURE and (requests[0].temperature, requests[0].seed) == (0.5, 3)
    assert requests[0].grammar == Grammar.schema({"type": "object", "properties": {"shape": {"type": "string"}}})
