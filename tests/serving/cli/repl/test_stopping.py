"""Ctrl-C while a bundle answers in this process."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from enginecast.testing import FakeAnswers, fake_model
from serving.cli.repl.stopping import Stopped, stopping
from serving.cli.terminal import Speaker
from serving.dialects.python.results import Answer
from serving.dialects.python.stream import Stream
from tests.fakes.serving import until


def press(model: FakeAnswers, stopped: threading.Event, times: int) -> None:
    """Press Ctrl-C in the second step of a model that is held, then let the model go on."""
    model.let(1)
    until(lambda: model.calls == 2)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(10)
    model.release()


@pytest.mark.parametrize(("times", "error"), [(1, Stopped), (2, KeyboardInterrupt)])
def test_the_answer_ends_before_its_next_token(
    times: int, error: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, speaker, stopped = FakeAnswers(), Speaker(), threading.Event()
    stream = fake_model(model).chat_stream("what?")
    cancel = stream.cancel
    monkeypatch.setattr(stream, "cancel", lambda: (cancel(), stopped.set()))
    model.hold()
    other = threading.Thread(target=press, args=(model, stopped, times))
    other.start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught, stopping(lambda: stream):
        speaker.speak(stream)
    other.join()
    assert type(caught.value) is error and signal.getsignal(signal.SIGINT) is before
    assert (model.calls, speaker.text, capsys.readouterr().out) == (2, "a ", "a ")


def test_ctrl_c_while_the_request_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has begun before the stream is in the hands of the program."""
    model = FakeAnswers()

    def begin() -> Stream[Answer]:
        stream = fake_model(model).chat_stream("what?")
        os.kill(os.getpid(), signal.SIGINT)
        return stream

    with pytest.raises(Stopped), stopping(begin) as stream:
        Speaker().speak(stream)
    assert model.calls <= 1


def test_a_process_that_ignores_ctrl_c_goes_on_to() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping(lambda: fake_model(FakeAnswers()).chat_stream("what?")) as stream:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert Speaker().speak(stream) == "a red círcle"
    finally:
        signal.signal(signal.SIGINT, before)
