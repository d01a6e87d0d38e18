"""The console and the progress bar that every command uses."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def make_console() -> Console:
    """Returns a console wide enough for the tables where the output is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=118)


def make_progress(console: Console) -> Progress:
    """Returns a progress bar with a description that is rewritten in place."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
