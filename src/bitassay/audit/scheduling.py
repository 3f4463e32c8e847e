"""Let several answers share one model: each takes a turn, which is a token.

A job is a generator that computes between its yields. All jobs run in one thread, since the taps on a model
and its tokenizer are not made for several; jobs under way are resumed in turn. What a job yields goes to an
asyncio queue of the handler that submitted it. Both the jobs under way and those that wait are bounded.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from bitassay.errors import BitassayError

WAKE_SECONDS = 1.0


class Busy(BitassayError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Failed:
    """Why a job ended before its end."""

    error: BaseException


_END = object()


class Job:
    """Work that was submitted, as its handler sees it."""

    def __init__(self, work: Iterator[Any]) -> None:
        self.work, self.cancelled = work, False
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def put(self, value: Any) -> None:
        """Hand a value to the handler, from the thread that computes."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, value)
        except RuntimeError:  # the server has gone
            self.cancelled = True

    async def results(self) -> AsyncIterator[Any]:
        """Yield what the job yields, and None whenever a second has passed without anything. Raises what the
        job raised."""
        while True:
            try:
                value = await asyncio.wait_for(self._queue.get(), WAKE_SECONDS)
            except TimeoutError:
                yield None
                continue
            if value is _END:
                return
            if isinstance(value, Failed):
                raise value.error
            yield value

    def cancel(self) -> None:
        """End the job before its next turn."""
        self.cancelled = True


class Scheduler:
    """A thread that runs `together` jobs in turn, while at most `waiting` others wait."""

    def __init__(self, together: int, waiting: int) -> None:
        self.together, self.waiting = together, waiting
        self.active: deque[Job] = deque()
        self.queue: deque[Job] = deque()
        self._unfinished = 0  # of all, that whose turn it is among them
        self._wake, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="bitassay-serve", daemon=True)
        self._thread.start()

    def submit(self, work: Iterator[Any]) -> Job:
        """Return the job that does `work`. Raises Busy where too many wait."""
        job = Job(work)
        with self._wake:
            if self._unfinished >= self.together + self.waiting:
                raise Busy(f"{self._unfinished} requests are under way or waiting", "ask again later")
            self._unfinished += 1
            self.queue.append(job)
            self._wake.notify()
        return job

    def stop(self) -> None:
        """End the thread after the turn under way; what has not ended fails."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopped or self.active or self.queue):
                    self._wake.wait()
                while self.queue and len(self.active) < self.together:
                    self.active.append(self.queue.popleft())
                if self._stopped:
                    for job in (*self.active, *self.queue):
                        job.put(Failed(BitassayError("the server is stopping", "ask again later")))
                    return
                job = self.active.popleft()
            goes_on = self._turn(job)
            with self._wake:
                if goes_on:
                    self.active.append(job)
                else:
                    self._unfinished -= 1

    def _turn(self, job: Job) -> bool:
        """Resume a job once; return whether it goes on."""
        try:
            if job.cancelled:
                job.work.close()  # type: ignore[attr-defined]
                return False
            job.put(next(job.work))
            return True
        except StopIteration:
            job.put(_END)
        except Exception as error:  # of one request, which must not end the others
            job.put(Failed(error))
        return False
