"""Progress on stderr: a live bar with the time left on a terminal, one plain line a step elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bitassay.cli.quiet import without_bars
from bitassay.record.progress import Progress

PLAIN_SECONDS = 5.0


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
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def draw(what: str, done: int = 0, total: int = 0) -> None:
            if not total:
                bar.console.print(what)
            elif what not in tasks:
                tasks[what] = int(bar.add_task(what, total=total, completed=done))
            else:
                bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield draw


class _PlainProgress:
    """Prints a line when a stage starts and ends, and every few seconds between, with the time left."""

    def __init__(self) -> None:
        self.stage, self.started, self.first, self.printed = "", 0.0, 0, 0.0

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if not total:
            print(what, file=sys.stderr, flush=True)
            return
        if what != self.stage:
            self.stage, self.started, self.first, self.printed = what, now, done, 0.0
        if done < total and now - self.printed < PLAIN_SECONDS:
            return
        self.printed = now
        moved = done - self.first
        left = (
            f", about {(now - self.started) / moved * (total - done):.0f} s left"
            if moved > 0 and done < total
            else ""
        )
        print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)
