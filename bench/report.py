"""``python -m bench report``: the tables of README.md, from the files in ``bench/results/``.

Between the two markers README.md holds what this module writes and nothing else, so that it has no
figure that is not in a result file. ``--check`` compares and changes nothing; a test does the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import results

BEGIN = "<!-- bench:report -->"
END = "<!-- /bench:report -->"
README = results.ROOT / "README.md"
RESULTS = results.ROOT / "bench" / "results"
Json = dict[str, Any]


class NoMarkers(ValueError):
    """The text has no place for the tables."""


def run(args: argparse.Namespace) -> int:
    """Runs the command; with ``--check`` returns 1 where README.md is out of date."""
    text = README.read_text("utf-8")
    new = with_tables(text, tables(RESULTS))
    if args.check:
        if new != text:
            print("README.md is not what bench/results/ says: run python -m bench report")
        return int(new != text)
    README.write_text(new, "utf-8")
    print("README.md: unchanged" if new == text else "README.md: written")
    return 0


def with_tables(text: str, made: str) -> str:
    """Puts the tables between the markers of a text.

    Raises:
        NoMarkers: if the text has not each of them once, in order.
    """
    before, first, rest = text.partition(BEGIN)
    _, last, after = rest.partition(END)
    if not first or not last or BEGIN in after or END in after:
        raise NoMarkers(f"expected {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{made.strip()}\n{END}{after}"


def tables(folder: Path) -> str:
    """All tables: a section for each device that has results, the CPU first."""
    devices = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.name != "cpu")
    return "\n\n".join(filter(None, map(section, devices)))


def section(folder: Path) -> str:
    """The tables of one device."""
    parts: list[tuple[str, Callable[[Json], Iterable[str]]]] = [
        ("calls", _calls),
        ("scaling", _scaling),
        ("train", _train),
        ("loops", _loops),
        ("kernels", _kernels),
    ]
    blocks, sources = [], []
    for name, write in parts:
        path = folder / f"{name}.json"
        made = []
        if path.is_file():
            data = json.loads(path.read_text("utf-8"))
            made = list(write(data))
        if not made:
            continue
        sources.append(_source(path.name, data["environment"]))
        blocks += made
        image = folder / f"{name}.png"
        if image.is_file():
            where = image.relative_to(results.ROOT) if results.ROOT in image.parents else image
            blocks.append(f"![{name}]({where})")
    if not blocks:
        return ""
    head = (
        f"### {folder.name}\n\nWritten by `python -m bench report` from the files in"
        f" `bench/results/{folder.name}/`, which hold the spread of each figure as well. Ratios are"
        " medians over interleaved rounds of one run; above 1 is in fastprob's favour, unless a"
        " column says else. **Bold** misses its goal."
    )
    return "\n\n".join([head, "\n".join(sources), *blocks])


def _source(name: str, run: Json) -> str:
    """What a file was measured on, and with."""
    versions = ", ".join(f"{k} {run['versions'][k]}" for k in ("torch", "tensordict", "torchrl"))
    changed = ", with uncommitted changes" if run.get("uncommitted_changes") else ""
    commit = (run.get("commit") or "unknown")[:7]
    return (
        f"- `{name}`: {run['device']}, {run['cores']} cores, {run['threads']} thread(s);"
        f" {versions}, Python {run['python']}; commit {commit}{changed}, {run['date'][:10]}"
    )


# ------------------------------------------------------------------------------------------- calls


def _calls(data: Json) -> Iterable[str]:
    titles = {row["case"]: row["title"] for row in data["results"]}
    yield from _slower(data, titles)
    yield from _refused((titles[row["case"]], row) for row in data["results"])
    yield from _targets(data, titles)
    yield from _families(data)
    yield from _forms(data)


def _slower(data: Json, titles: dict[str, str]) -> Iterable[str]:
    header = ["", "shape", "fastprob", "the other", "other ÷ fastprob"]
    alike, unlike = [], []
    for s in data["slower"]:
        row = [
            titles[s["case"]],
            _shape(s["shape"]),
            s["fastprob"],
            s["other"],
            _number(s["ratio"]),
        ]
        same = s["fastprob"].replace("fastprob", "upstream") == s["other"]
        (alike if same else unlike).append(row)
    if alike:
        yield "**Where fastprob is slower than upstream**, form by form:"
        yield _table(header, alike)
    else:
        yield "fastprob is slower than upstream in no case, form by form."
    if unlike:
        what = (
            "Where fastprob in eager mode is slower than upstream compiled, or hand-written tensors"
        )
        yield _folded(f"{what} ({len(unlike)})", _table(header, unlike))


def _refused(rows: Iterable[tuple[str, Json]]) -> Iterable[str]:
    lines = [
        f"- {title}, {_shape(row['shape'])}: {why}"
        for title, row in rows
        for why in row.get("refused", {}).values()
    ]
    if lines:
        yield "**Refused by the gate**, and not timed:"
        yield "\n".join(lines)


def _targets(data: Json, titles: dict[str, str]) -> Iterable[str]:
    if not data["targets"]:
        return
    shapes = _unique(_shape(t["shape"]) for t in data["targets"])
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for t in data["targets"]:
        ratio = _number(t["ratio"])
        cell = f"{ratio if t['met'] else f'**{ratio}**'} ({t['target']})"
        key = (titles[t["case"]], t["numerator"], t["denominator"])
        lines.setdefault(key, {})[_shape(t["shape"])] = cell
    met = sum(t["met"] for t in data["targets"])
    yield f"**Goals**, {met} of {len(data['targets'])} met:"
    yield _table(
        ["", "ratio", *shapes],
        [
            [title, f"{first} ÷ {second}", *(cells.get(shape, "") for shape in shapes)]
            for (title, first, second), cells in lines.items()
        ],
    )


def _families(data: Json) -> Iterable[str]:
    """Upstream ÷ fastprob in eager mode, a family a line."""
    shapes, lines = [], {}
    for row in data["results"]:
        title, _, kind = row["title"].partition(", ")
        gain = row["ratios_to_fastprob"].get("upstream")
        if gain is None or kind not in ("random", "mode", "deterministic", "mean"):
            continue
        plain = title.removeprefix("safe ")
        column = ("safe " if plain != title else "") + kind
        shape = _shape(row["shape"])
        if shape not in ("16×8", "4096×8"):
            continue
        shapes.append(shape)
        lines.setdefault(plain, {})[column, shape] = _number(gain)
    columns = [
        (kind, shape)
        for kind in ("random", "safe random", "mode", "deterministic", "mean")
        for shape in _unique(shapes)
    ]
    if lines:
        table = _table(
            ["", *(f"{kind} {shape}" for kind, shape in columns)],
            [[name, *(cells.get(c, "") for c in columns)] for name, cells in lines.items()],
        )
        what = "Every family in eager mode, upstream ÷ fastprob; empty where upstream has no value"
        yield _folded(what, table)


def _forms(data: Json) -> Iterable[str]:
    """µs a call of each provider, for the cases that have more than the two eager ones."""
    rows = [r for r in data["results"] if {"upstream compiled"} & r["providers"].keys()]
    names = _unique(name for row in rows for name in row["providers"])
    if rows:
        table = _table(
            ["", "shape", *names],
            [
                [row["title"], _shape(row["shape"])]
                + [_us(row["providers"].get(name)) for name in names]
                for row in rows
            ],
        )
        yield _folded("Compiled, exported and the rest, µs a call", table)


# ------------------------------------------------------------------------------ the other commands


def _scaling(data: Json) -> Iterable[str]:
    lines: dict[str, dict[str, str]] = {}
    for point in data["points"]:
        providers = point["providers"]
        if {"upstream", "fastprob"} <= providers.keys():
            gain = providers["upstream"]["p50"] / providers["fastprob"]["p50"]
            lines.setdefault(point["family"], {})[_shape(point["shape"])] = f"{gain:.2g}"
    shapes = _unique(_shape(p["shape"]) for p in sorted(data["points"], key=lambda p: p["axis"]))
    yield from _refused((point["family"], point) for point in data["points"])
    yield "**Scaling**, upstream ÷ fastprob, random value and score, eager:"
    yield _table(
        ["", *shapes],
        [[name, *(cells.get(shape, "") for shape in shapes)] for name, cells in lines.items()],
    )


def _train(data: Json) -> Iterable[str]:
    seconds = data["cpu_seconds_median"]
    sides = list(seconds)
    rows = [
        [part, *(f"{seconds[side][part]:.2f}" for side in sides)] for part in seconds["upstream"]
    ]
    returns = (", ".join(f"{r['final_return']:.0f}" for r in data["runs"][side]) for side in sides)
    yield "**PPO on Pendulum-v1** by TorchRL (`python -m bench`), CPU seconds a run:"
    yield _table(["", *sides], [*rows, ["final returns", *returns]])


def _loops(data: Json) -> Iterable[str]:
    rows = []
    for item in data["loops"]:
        row = [item["loop"]]
        speed = item["steps_per_second"]
        for part in ("collection", "update"):
            both = [speed[side][part] for side in ("upstream", "fastprob")]
            row += [*(f"{rate:,.0f}" for rate in both), f"{both[1] / both[0]:.2f}"]
        for side in ("upstream", "fastprob"):
            row.append(" ".join(f"{run['final_return']:.0f}" for run in item["runs"][side]))
        rows.append([*row, f"≥ {item['goal']:g}"])
    what = data["unit"].partition(";")[0].removeprefix("steps per second of ")
    yield (
        "**Training loops** (`python -m bench loops`): environment steps collected, and updates"
        f" made, in a second of {what}; fastprob ÷ upstream; returns of the seeds:"
    )
    names = [
        name
        for part in ("collection", "update")
        for name in (f"{part}, upstream", f"{part}, fastprob", "ratio")
    ]
    yield _table(["", *names, "returns, upstream", "returns, fastprob", "goal"], rows)


def _kernels(data: Json) -> Iterable[str]:
    rows = [
        [
            *(row["pass"], _shape(row["shape"]), row["dtype"]),
            *(_us(row["us"]), _us(row["copy_us"]), f"{row['part_of_copy_speed']:.0%}"),
        ]
        for row in data["kernels"]
        # Without a GPU, the file is about machine code, and nothing in it was timed.
        if "part_of_copy_speed" in row
    ]
    if rows:
        yield "**Kernels**, device time, and a copy of as many bytes:"
        yield _table(["", "shape", "dtype", "µs", "copy, µs", "of copy speed"], rows)


# --------------------------------------------------------------------------------------- the cells


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _folded(summary: str, table: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape)


def _number(quantiles: Json) -> str:
    return f"{quantiles['p50']:.2f}"


def _us(quantiles: Json | None) -> str:
    if quantiles is None:
        return ""
    value = quantiles["p50"]
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
