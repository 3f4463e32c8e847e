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
    """What is known of one stage: how many of its steps are `done`, and since when."""

    def __init__(self, done: int, total: int, now: float):
        self.first = self.done = done
        self.total, self.started, self.last = total, now, now

    def step(self, done: int, now: float) -> None:
        if done > self.done:
            self.done, self.last = done, now

    def seconds_left(self, now: float) -> float | None:
        """Return None before the first step and after the last."""
        moved, left = self.done - self.first, self.total - self.done
        if moved <= 0 or left <= 0:
            return None
        pace = (self.last - self.started) / moved
        return max(pace * left - (now - self.last), pace * (left - 1))


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield a Progress that draws on stderr, and keep libraries from drawing there meanwhile."""
    with without_bars():
        if sys.stderr.isatty():
            with _bars() as draw:
                yield draw
        else:
            yield _PlainProgress()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, rich_progress.TaskID] = {}

        def draw(what: str, done: int = 0, total: int = 0) -> None:
            if not total:
                bar.console.print(what)
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            elif done < bar.tasks[tasks[what]].completed:
                bar.reset(tasks[what])
            bar.update(tasks[what], completed=done, total=total)

        yield draw


class _PlainProgress:
    """Print a line when a stage starts and ends, and every few seconds between, with the time left."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now, stage = time.monotonic(), self.stages.get(what)
        if not total:
            print(what, file=sys.stderr, flush=True)
            return
        begins = stage is None or done < stage.done or total != stage.total
        if stage is None or begins:
            stage = self.stages[what] = Stage(done, total, now)
        ends = stage.done < done == total
        stage.step(done, now)
        due = done < total and now - self.printed.get(what, now) >= PLAIN_SECONDS
        if begins or ends or due:
            self.printed[what] = now
            seconds = stage.seconds_left(now)
            left = "" if seconds is None else f", about {seconds:.0f} s left"
            print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)
