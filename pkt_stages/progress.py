"""Progress bars for anything that takes over two seconds, on stderr, quiet when nobody watches a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items; after two seconds show a bar with the time left. Without a terminal: a line every 10 %."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = len(items) if total is None and isinstance(items, Sized) else total
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    start, shown, tenth = time.perf_counter(), False, 0
    task = progress.add_task(what, total=total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if time.perf_counter() - start <= 2:
                continue
            if console.is_terminal:
                if not shown:
                    progress.start()
                    shown = True
                progress.update(task, completed=done)
            elif total and done * 10 // total > tenth:
                tenth = done * 10 // total
                console.print(f"{what}: {done}/{total}", highlight=False)
    finally:
        if shown:
            progress.stop()
