"""The console, the tables and the progress bar that every command uses.

Drawn by rich where it is installed. The GPU machine has torch, triton, tensordict, TorchRL and
pytest and nothing else: there the same calls print plain text.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

try:
    from rich.console import Console as _Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table as _Table
except ImportError:
    _Console = None

# Wide enough for the tables where the output is not a terminal.
WIDTH = 128


class PlainTable:
    """What is used of ``rich.table.Table``, kept as rows of text."""

    def __init__(self, title: str = "", title_justify: str = "left") -> None:
        self.title = title
        self.right: list[bool] = []
        self.rows: list[list[str]] = [[]]

    def add_column(self, header: str, justify: str = "left") -> None:
        self.rows[0].append(header)
        self.right.append(justify == "right")

    def add_row(self, *cells: str) -> None:
        self.rows.append([_plain(cell) for cell in cells])

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self.right, strict=True)
            ).rstrip()
            for row in self.rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *lines] if self.title else lines)


class PlainConsole:
    """What is used of ``rich.console.Console``."""

    is_terminal = False

    def print(self, *values: Any) -> None:
        print(*(v if isinstance(v, PlainTable) else _plain(str(v)) for v in values), flush=True)


class PlainProgress:
    """A line every now and then, in place of a bar that is redrawn."""

    def __init__(self, every_s: float = 15.0) -> None:
        self._every_s = every_s
        self._shown = time.monotonic()
        self._total = self._done = 0.0
        self._text = ""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_task(self, description: str, total: float) -> int:
        self._text, self._total, self._done = description, total, 0.0
        return 0

    def update(self, task: int, advance: float = 0.0, description: str | None = None) -> None:
        self._text = description or self._text
        self._done += advance
        if time.monotonic() - self._shown >= self._every_s:
            self._shown = time.monotonic()
            print(f"[{self._done:g}/{self._total:g}] {self._text}", file=sys.stderr, flush=True)

    def advance(self, task: int) -> None:
        self.update(task, advance=1.0)


def make_console() -> Any:
    """Returns a console; plain where rich is not installed."""
    if _Console is None:
        return PlainConsole()
    console = _Console()
    return console if console.is_terminal else _Console(width=WIDTH)


def make_table(title: str = "", left: tuple[str, ...] = (), right: tuple[str, ...] = ()) -> Any:
    """Returns a table with columns aligned left, then columns aligned right."""
    table: Any = (PlainTable if _Console is None else _Table)(title=title, title_justify="left")
    for header in left:
        table.add_column(header)
    for header in right:
        table.add_column(header, justify="right")
    return table


def make_progress(console: Any) -> Any:
    """Returns a progress bar with a description that is rewritten in place.

    Where the output is no terminal, a line on stderr every 15 seconds.
    """
    if _Console is None or not console.is_terminal:
        return PlainProgress()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _plain(text: str) -> str:
    """Text without rich's marks of colour, such as ``[red]`` and ``[/]``."""
    return re.sub(r"\[/?[a-z ]*\]", "", text)
