"""A soak: thousands of requests of many clients to one server, of which a third are cancelled or killed at random.

`soak` starts the server, draws and answers every request once alone, then starts processes of clients, each of which is
this file run as a program. A client compares each answer with the one that its request got alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from runtime.errors import EnginecastError
from serving.dialects.python.client import Client
from serving.dialects.python.requests import Message
from serving.dialects.python.results import Answer
from serving.dialects.python.stream import Stream

PROCESSES: Final = 8
CLIENTS: Final = 8
"""In each process."""
STOPPED: Final = 0.45
"""Share of requests that are stopped unless they are answered before; a third of all are."""
HOW: Final = {"cancel": 0.6, "close": 0.39, "kill": 0.01}
"""How a request is stopped: its call is cancelled, its connection is closed, or its process ends by SIGKILL, which ends
the requests of the other clients there as well.
"""
LONGEST: Final = {"chat": 0.15, "draw": 3.0}
"""Seconds after which a request is stopped at the latest."""
PATIENCE: Final = 120.0
"""Seconds in which a request must be answered."""
STEPS: Final = 2
CLOSE: Final = 40.0
"""Decibels between a picture and the one drawn alone."""
TURNS: Final = "and what else do you see?"


@dataclass
class Found:
    """What came of a soak. `before` and `after` are what the server holds while nothing runs: bytes of memory, threads,
    open files. `seconds` are those of each answered request, by its kind.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    left: int = -1
    """Requests that still run or wait at the end."""

    def table(self) -> str:
        lines = [f"{self.outcomes.total()} requests: {dict(self.outcomes)}"]
        for kind, values in sorted(self.seconds.items()):
            shown = (f"p{percent} {percentile(values, percent):.2f} s" for percent in (50, 95, 99))
            lines.append(f"{kind}: {len(values)} answered, {', '.join(shown)}")
        lines += [f"{name}: {value} before, {self.after[name]} after" for name, value in self.before.items()]
        return "\n".join([*lines, *self.faults[:20]])


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


# --- the requests, and what each gives alone


def write_cases(folder: Path, chats: int, drawings: int) -> None:
    """Questions about pictures, conversations that go on, and prompts, as files for the clients."""
    from samples.world.questions import test_questions
    from samples.world.scenes import test_prompts

    cases: list[dict[str, Any]] = []
    for number, case in enumerate(test_questions(chats)):
        name = f"picture{number}.png"
        Image.fromarray(case.picture).save(folder / name)
        turns = [case.question] if number % 4 else [case.question, "a red circle", TURNS]
        cases.append({"kind": "chat", "picture": name, "turns": turns})
    for number, scene in enumerate(test_prompts(drawings)):
        cases.append({"kind": "draw", "prompt": scene.caption, "seed": number})
    (folder / "cases.json").write_text(json.dumps(cases))


def answered_alone(folder: Path, address: str) -> None:
    """Store the answer of each case, each run while nothing else does."""
    cases = json.loads((folder / "cases.json").read_bytes())
    with Client(address, timeout=PATIENCE) as client:
        for number, case in enumerate(cases):
            case["answer"] = answer = result(sent(client, folder, case))
            if not isinstance(answer, str):
                np.save(folder / f"drawn{number}.npy", answer)
                case["answer"] = f"drawn{number}.npy"
    (folder / "cases.json").write_text(json.dumps(cases))


def sent(client: Client, folder: Path, case: dict[str, Any]) -> Stream[Any]:
    """The stream of a case."""
    if case["kind"] == "draw":
        client.model = "draw"
        return client.generate_stream(case["prompt"], steps=STEPS, seed=case["seed"])
    client.model = "talk"
    first, *others = case["turns"]
    roles: Iterator[Any] = itertools.cycle(["assistant", "user"])
    turns = [Message("user", [folder / case["picture"], first]), *map(Message, roles, others)]
    return client.chat_stream(turns, temperature=0, max_tokens=24)


def result(stream: Stream[Any]) -> Any:
    """What a stream gives: a text or a picture."""
    found = stream.result()
    return found.text if isinstance(found, Answer) else found.image


def fault(folder: Path, case: dict[str, Any], answer: Any) -> str:
    """What is wrong with an answer, "" if nothing is."""
    if isinstance(answer, str):
        return "" if answer == case["answer"] else f"'{answer}' instead of '{case['answer']}'"
    alone = np.load(folder / case["answer"]).astype(np.float64)
    error = float(np.square(answer - alone).mean())
    decibels = math.inf if error == 0 else 10 * math.log10(255**2 / error)
    return "" if decibels >= CLOSE else f"a picture at {decibels:.1f} dB of the one drawn alone"


# --- a process of clients


class Clients:
    """The clients of one process. Writes a line when a request begins and one when it ends."""

    def __init__(self, folder: Path, address: str, seed: int, requests: int) -> None:
        self.folder, self.address = folder, address
        self.cases = json.loads((folder / "cases.json").read_bytes())
        self.random = random.Random(seed)
        self.left = requests
        self.lock = threading.Lock()

    def run(self) -> None:
        threads = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self) -> None:
        client = Client(self.address, timeout=PATIENCE)
        while drawn := self.draw():
            say("begin")
            client = self.request(client, *drawn)
        client.close()

    def draw(self) -> tuple[dict[str, Any], str, float] | None:
        """The next request, how it is stopped ("" if it is not), and when."""
        with self.lock:
            if not self.left:
                return None
            self.left -= 1
            stop = ""
            if self.random.random() < STOPPED:
                (stop,) = self.random.choices(list(HOW), list(HOW.values()))
            case = self.random.choice(self.cases)
            return case, stop, self.random.uniform(0, LONGEST[case["kind"]])

    def request(self, client: Client, case: dict[str, Any], stop: str, delay: float) -> Client:
        """Send one request. Returns the client to go on with."""
        began = time.monotonic()
        stopped = threading.Event()
        stream = sent(client, self.folder, case)
        timer = threading.Timer(delay, self.stop, [client, stream, stop, stopped])
        if stop:
            timer.start()
        try:
            wrong = fault(self.folder, case, result(stream))
            outcome = f"wrong: {wrong} ({case})" if wrong else "right"
        except EnginecastError as error:
            outcome = "stopped" if stopped.is_set() else f"{type(error).__name__}: {error}"
        timer.cancel()
        if stop:
            timer.join()
        say(f"end {case['kind']} {time.monotonic() - began:.3f} {outcome}")
        return Client(self.address, timeout=PATIENCE) if stopped.is_set() and stop == "close" else client

    def stop(self, client: Client, stream: Stream[Any], how: str, stopped: threading.Event) -> None:
        stopped.set()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "close":
            client.close()
        else:
            stream.cancel()


def say(line: str) -> None:
    """Write a line at once: those of several threads do not mix."""
    os.write(1, f"{line[:2000]}\n".encode())


# --- the soak


@contextmanager
def server(diffusion: Path, vlm: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of both bundles in a process of its own, and its address."""
    command = [sys.executable, "-m", "serving.cli.commands", "serve", f"draw={diffusion}", f"talk={vlm}"]
    options = ["--address", "127.0.0.1:0", "--max-queue", "128"]
    with log.open("w") as errors:
        started = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert started.stdout is not None
            address = started.stdout.readline().split()[-1]
            while "is ready" not in (line := started.stdout.readline()):
                assert line, log.read_text()
            assert "is ready" in started.stdout.readline(), log.read_text()
            yield started, address
        finally:
            started.terminate()
            started.wait(60)
            assert started.stdout is not None
            started.stdout.close()


def soak(diffusion: Path, vlm: Path, folder: Path, requests: int, minutes: float) -> Found:
    """Send so many requests, or as many as there is time for, after a tenth as many that are not counted."""
    found = Found()
    deadline = time.monotonic() + minutes * 60
    write_cases(folder, 48, 24)
    with server(diffusion, vlm, folder / "server.log") as (process, address):
        answered_alone(folder, address)
        crowd(folder, address, requests // 10, deadline, Found())
        found.before = settled(process.pid, address)[1]
        crowd(folder, address, requests, deadline, found)
        found.left, found.after = settled(process.pid, address)
        crowd_of_one(folder, address, found)
    return found


def crowd(folder: Path, address: str, requests: int, deadline: float, found: Found) -> None:
    """Run all clients. A process that is killed is replaced by another."""
    lock = threading.Lock()

    def member(seed: int) -> None:
        left = math.ceil(requests / PROCESSES)
        while left > 0 and time.monotonic() < deadline:
            seed += PROCESSES
            left -= watch(folder, address, seed, left, deadline, found, lock)

    threads = [threading.Thread(target=member, args=[seed], daemon=True) for seed in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def watch(
    folder: Path, address: str, seed: int, requests: int, deadline: float, found: Found, lock: threading.Lock
) -> int:
    """Run one process of clients to its end, and count what it says. Returns how many requests it began."""
    command = [sys.executable, __file__, str(folder), address, str(seed), str(requests)]
    begun = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
        timer.start()
        assert process.stdout is not None
        open_ = 0
        for line in process.stdout:
            word, _, rest = line.strip().partition(" ")
            begun, open_ = begun + (word == "begin"), open_ + (1 if word == "begin" else -1)
            if word == "end":
                with lock:
                    count(found, *rest.split(" ", 2))
        timer.cancel()
    with lock:
        found.outcomes["killed"] += open_
        if process.returncode not in (0, -signal.SIGKILL):
            found.faults.append(f"a process of clients ended with {process.returncode}")
    return begun


def count(found: Found, kind: str, seconds: str, outcome: str) -> None:
    found.outcomes[outcome.partition(":")[0]] += 1
    if outcome == "right":
        found.seconds.setdefault(kind, []).append(float(seconds))
    elif outcome != "stopped":
        found.faults.append(outcome)


def crowd_of_one(folder: Path, address: str, found: Found) -> None:
    """Every case once more, alone."""
    with Client(address, timeout=PATIENCE) as client:
        for case in json.loads((folder / "cases.json").read_bytes()):
            wrong = fault(folder, case, result(sent(client, folder, case)))
            found.faults += [f"afterwards, alone: {wrong}"] if wrong else []


def settled(pid: int, address: str) -> tuple[int, dict[str, int]]:
    """How many requests are left, and what the server holds, when nothing has run for a while."""
    limit = time.monotonic() + 30
    with Client(address) as client:
        while (left := sum(model.running + model.queued for model in client.models())) and time.monotonic() < limit:
            time.sleep(0.1)
    time.sleep(5)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    files = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            entry.readlink()
            files += 1
    return left, {"bytes": int(status["VmRSS"].split()[0]) << 10, "threads": int(status["Threads"]), "files": files}


if __name__ == "__main__":
    where, at, *numbers = sys.argv[1:]
    Clients(Path(where), at, *map(int, numbers)).run()
