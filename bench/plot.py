"""Figures as PNG. Matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

import statistics
from pathlib import Path


def learning_curves(path: Path, returns: dict[str, list[list[float]]], frames: int) -> Path:
    """Draws the return over environment steps: a thin line per seed, a thick one for the mean.

    Args:
        path: where the PNG is written; its folder is made.
        returns: per implementation and seed, the mean return of each iteration.
        frames: environment steps per iteration.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would pick a backend, and keep the figure alive.
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {"upstream": ("tab:gray", "-"), "fastprob": ("tab:blue", "--")}
    for name, runs in returns.items():
        color, line = styles[name]
        steps = [frames * (i + 1) for i in range(len(runs[0]))]
        for run in runs:
            axes.plot(steps, run, color=color, linestyle=line, linewidth=0.8, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
        label = f"{name}, mean of {len(runs)}"
        axes.plot(steps, mean, color=color, linestyle=line, linewidth=2.2, label=label)
    axes.set(xlabel="environment steps", ylabel="mean return", title="PPO on Pendulum-v1")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
