"""Readers are woken by a thread of their own."""

from __future__ import annotations

import asyncio
import threading

from serving.host.waking import Waker


def test_a_thread_that_wakes_readers_goes_on_at_once() -> None:
    """On Python's default it would wait until the loop has done what it was woken for."""
    waker, held = Waker(), threading.Event()

    async def read() -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()

        def work() -> None:
            waker.wake(first)
            waker.wake(second)
            held.set()

        threading.Thread(target=work).start()
        await asyncio.wait_for(first, 5)
        await asyncio.wait_for(second, 5)

    asyncio.run(read())
    assert held.is_set()


def test_a_reader_that_has_left_and_a_loop_that_is_closed_are_passed_over() -> None:
    waker = Waker()
    closed = asyncio.new_event_loop()
    gone = closed.create_future()
    closed.close()

    async def read() -> str:
        loop = asyncio.get_running_loop()
        left, last = loop.create_future(), loop.create_future()
        left.cancel()
        for reader in (gone, left, last):
            waker.wake(reader)
        await asyncio.wait_for(last, 5)
        return "woken"

    assert asyncio.run(read()) == "woken"
    assert not gone.done()


def test_wakeups_from_many_threads_all_arrive() -> None:
    waker = Waker()

    async def read() -> None:
        loop = asyncio.get_running_loop()
        readers = [loop.create_future() for _ in range(400)]
        threads = [
            threading.Thread(target=lambda part: [waker.wake(reader) for reader in part], args=(readers[i::8],))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(asyncio.gather(*readers), 10)

    asyncio.run(read())
    assert sum(thread.name == "waker" and thread.is_alive() for thread in threading.enumerate()) >= 1
