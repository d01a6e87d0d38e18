"""Figures as PNG. Matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES = {"upstream": ("tab:gray", "-"), "fastprob": ("tab:blue", "--")}


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would pick a backend, and keep the figure alive.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def learning_curves(path: Path, returns: dict[str, list[list[float]]], frames: int) -> Path:
    """Draws the return over environment steps: a thin line per seed, a thick one for the mean.

    Args:
        path: where the PNG is written; its folder is made.
        returns: per implementation and seed, the mean return of each iteration.
        frames: environment steps per iteration.
    """
    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    for name, runs in returns.items():
        color, line = STYLES[name]
        steps = [frames * (i + 1) for i in range(len(runs[0]))]
        for run in runs:
            axes.plot(steps, run, color=color, linestyle=line, linewidth=0.8, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
        label = f"{name}, mean of {len(runs)}"
        axes.plot(steps, mean, color=color, linestyle=line, linewidth=2.2, label=label)
    axes.set(xlabel="environment steps", ylabel="mean return", title="PPO on Pendulum-v1")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _save(figure, path)


def loop_curves(
    path: Path,
    curves: Mapping[str, Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]]],
    goals: Mapping[str, float],
) -> Path:
    """Draws a panel for each loop: the mean return over environment steps, a line per seed.

    Args:
        path: where the PNG is written; its folder is made.
        curves: per loop and implementation, each seed's steps and returns.
        goals: per loop; drawn where finite.
    """
    columns = min(len(curves), 5)
    rows = -(-len(curves) // columns)
    figure = _figure(4 * columns, 3.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes, (loop, sides) in zip(panels, curves.items(), strict=False):
        for side, runs in sides.items():
            color, line = STYLES[side]
            for i, (steps, values) in enumerate(runs):
                label = side if i == 0 else None
                axes.plot(steps, values, color=color, linestyle=line, linewidth=1.2, label=label)
        if math.isfinite(goals[loop]):
            axes.axhline(goals[loop], color="tab:green", linewidth=0.8, label="goal")
        axes.set(xlabel="environment steps", ylabel="mean return", title=loop)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    return _save(figure, path)


def scaling_curves(path: Path, points: Sequence[Mapping[str, Any]]) -> Path:
    """Draws a panel for each family and axis: time of a call over size, both logarithmic.

    Args:
        path: where the PNG is written; its folder is made.
        points: those of ``scaling.json``.
    """
    families = list(dict.fromkeys(point["family"] for point in points))
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure = _figure(4 * len(families), 3.4 * len(axes_names))
    panels = figure.subplots(len(axes_names), len(families), squeeze=False)
    for i, axis in enumerate(axes_names):
        for j, family in enumerate(families):
            panel = panels[i][j]
            here = [p for p in points if p["family"] == family and p["axis"] == axis]
            for name in dict.fromkeys(name for p in here for name in p["providers"]):
                with_it = [p for p in here if name in p["providers"]]
                side = name.partition(" ")[0]
                color, line = STYLES.get(side, ("tab:green", ":"))
                if name not in STYLES and side in STYLES:
                    line = ":"
                panel.loglog(
                    [p["at"] for p in with_it],
                    [p["providers"][name]["p50"] for p in with_it],
                    color=color,
                    linestyle=line,
                    marker=".",
                    label=name,
                )
            fixed = "rows of 8" if axis == "rows" else "width of 256 rows"
            panel.set(xlabel=fixed, ylabel="µs a call", title=family)
            panel.grid(alpha=0.3, which="both")
            panel.legend()
    return _save(figure, path)
