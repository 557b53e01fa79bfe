"""A progress bar for people: on a terminal only, on stderr, so that stdout stays for results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, of) that shows the count, the speed and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(unit, total=None, speed="")

        def show(done: int, total: int) -> None:
            speed = progress.tasks[task].speed
            shown = f"{speed:.1f} {unit}/s" if speed else ""
            progress.update(task, completed=done, total=total, speed=shown)

        yield show
