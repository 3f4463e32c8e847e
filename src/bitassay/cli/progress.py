"""Progress on stderr: a live bar with the time left on a terminal, one plain line a step elsewhere.

The time left is the mean pace of the steps that are finished, times those that are not. Between two steps it
counts down, to no less than the steps that have not begun: time that passes within a step is no reason to
expect more of it.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bitassay.cli.quiet import without_bars
from bitassay.record.progress import Progress

PLAIN_SECONDS = 5.0


class Stage:
    """What is known of one stage: of how many steps `done`, since when."""

    def __init__(self, done: int, total: int, now: float):
        self.first = self.done = done
        self.total, self.started, self.last = total, now, now

    def goes_on(self, done: int, total: int) -> bool:
        """Whether these numbers are of the same stage; one that falls back has begun anew."""
        return done >= self.done and total == self.total

    def step(self, done: int, now: float) -> None:
        if done > self.done:
            self.done, self.last = done, now

    def seconds_left(self, now: float) -> float | None:
        """None before the first step and after the last."""
        moved, left = self.done - self.first, self.total - self.done
        if moved <= 0 or left <= 0:
            return None
        pace = (self.last - self.started) / moved
        return max(pace * left - (now - self.last), pace * (left - 1))


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield a Progress that draws on stderr, where nothing else draws meanwhile."""
    with without_bars():
        if sys.stderr.isatty():
            with _bars() as draw:
                yield draw
        else:
            yield _PlainProgress()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class LeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = task.fields["stage"].seconds_left(time.monotonic())
            return Text("-:--" if seconds is None else f"{seconds // 60:.0f}:{seconds % 60:02.0f}")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        LeftColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}
        stages: dict[str, Stage] = {}

        def draw(what: str, done: int = 0, total: int = 0) -> None:
            if not total:
                bar.console.print(what)
                return
            now = time.monotonic()
            if what not in stages or not stages[what].goes_on(done, total):
                stages[what] = Stage(done, total, now)
            stages[what].step(done, now)
            if what not in tasks:
                tasks[what] = int(bar.add_task(what, total=total, completed=done, stage=stages[what]))
            else:
                bar.update(tasks[what], completed=done, total=total, stage=stages[what])  # type: ignore[arg-type]

        yield draw


class _PlainProgress:
    """Prints a line when a stage starts and ends, and every few seconds between, with the time left."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if not total:
            print(what, file=sys.stderr, flush=True)
            return
        begins = what not in self.stages or not self.stages[what].goes_on(done, total)
        if begins:
            self.stages[what] = Stage(done, total, now)
        stage = self.stages[what]
        ends = stage.done < done == total
        stage.step(done, now)
        due = done < total and now - self.printed.get(what, now) >= PLAIN_SECONDS
        if not (begins or ends or due):
            return
        self.printed[what] = now
        seconds = stage.seconds_left(now)
        left = "" if seconds is None else f", about {seconds:.0f} s left"
        print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)
