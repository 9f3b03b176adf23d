"""Nothing is lost and nothing stays behind when thousands of requests come and a third of them are stopped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.serving.soak import Found, count, fault, soak

REQUESTS = int(os.environ.get("ENGINECAST_SOAK_REQUESTS", "1500"))
MINUTES = 20


@pytest.mark.full
@pytest.mark.timeout((MINUTES + 10) * 60)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="memory and files are read from Linux' /proc")
def test_soak(diffusion_bundle: Path, vlm_bundle: Path, tmp_path: Path) -> None:
    found = soak(diffusion_bundle, vlm_bundle, tmp_path, REQUESTS, MINUTES)
    print(found.table())
    assert not found.faults
    assert set(found.outcomes) <= {"right", "stopped", "killed"}
    assert found.left == 0
    answered = found.outcomes["right"] / found.outcomes.total()
    assert 0.5 < answered < 0.8, "about a third is stopped"
    assert found.after["bytes"] < 1.03 * found.before["bytes"], found.table()
    assert found.after["threads"] <= found.before["threads"] + 3, "gRPC starts and ends threads as it needs them"
    assert found.after["files"] <= found.before["files"]
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def test_a_wrong_answer_is_a_fault(tmp_path: Path) -> None:
    alone = np.random.default_rng(0).integers(0, 250, (8, 8, 3), np.uint8)
    np.save(tmp_path / "drawn0.npy", alone)
    drawn = {"answer": "drawn0.npy"}
    assert not fault(tmp_path, drawn, alone) and not fault(tmp_path, drawn, alone + 1), "48 dB"
    assert "38.6 dB" in fault(tmp_path, drawn, alone + 3)
    assert not fault(tmp_path, {"answer": "red"}, "red") and fault(tmp_path, {"answer": "red"}, "blue")
    found = Found()
    for outcome in ("right", "stopped", "wrong: 'blue' instead of 'red'", "Unavailable: no server"):
        count(found, "chat", "0.5", outcome)
    assert found.faults == ["wrong: 'blue' instead of 'red'", "Unavailable: no server"]
    assert found.seconds == {"chat": [0.5]} and found.outcomes["Unavailable"] == 1
