"""A bar on standard error that counts images, on the first host of a run."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bit_jax.scale import hosts
from input_pipeline import terminal
from input_pipeline.terminal import printable


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the `with` block runs; gives a function that is called with the number of images done."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    console = terminal.console(stderr=True, quiet=not hosts.is_first())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(printable(title), total=total)
        yield lambda done: progress.update(task, completed=done)
