"""``python -m bench report``: the tables of README.md, from the files in ``bench/results/``.

Between the two markers README.md holds what this module writes and nothing else, so that it has no
figure that is not in a result file. ``--check`` compares and changes nothing; a test does the same.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import results

BEGIN = "<!-- bench:report -->"
END = "<!-- /bench:report -->"
README = results.ROOT / "README.md"
RESULTS = results.ROOT / "bench" / "results"
Json = dict[str, Any]
SIDES = ("upstream", "fastprob")
# The columns of the table of families; stored actions are scored, and the score differentiated.
STORED = {"stored actions": "score", "stored actions, fwd+bwd": "score, fwd+bwd"}
KINDS = ("random", "safe random", "mode", "deterministic", "mean", *STORED.values())


class NoMarkers(ValueError):
    """The text has no place for the tables."""


def run(args: argparse.Namespace) -> int:
    """Runs the command; with ``--check`` returns 1 where README.md is out of date."""
    text = README.read_text("utf-8")
    made = tables(RESULTS)
    new = with_tables(text, made)
    if args.quick:
        print(made)
        return 0
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


@dataclass(frozen=True)
class Slow:
    """Something that fastprob is slower at than another provider.

    Attributes:
        file: without its ending, where it stands.
        what: the case, loop or family.
        at: its shape, or the part of the loop.
        ours: the form of fastprob.
        other: the provider that is faster.
        ratio: the other's time ÷ fastprob's, below 1.
    """

    file: str
    what: str
    at: str
    ours: str
    other: str
    ratio: float

    @property
    def same_form(self) -> bool:
        """Whether both are eager, both compiled, and so on."""
        return self.ours.replace("fastprob", "upstream") == self.other


def section(folder: Path) -> str:
    """The tables of one device; what fastprob is slower at comes first, of all files."""
    parts: list[tuple[str, Callable[[Json], Iterable[str]], Callable[[Json], Iterable[Slow]]]] = [
        ("calls", _calls, _slow_calls),
        ("compiled", _compiled, _slow_compiled),
        ("opaque", _opaque, _no_slow),
        ("matrix", _matrix, _no_slow),
        ("graphs", _graphs, _slow_graphs),
        ("scaling", _scaling, _slow_scaling),
        ("train", _train, _slow_train),
        ("loops", _loops, _slow_loops),
        ("loops-mujoco", _mujoco, _slow_loops),
        ("kernels", _kernels, _no_slow),
    ]
    blocks, sources, slow = [], [], []
    for name, write, slower in parts:
        path = folder / f"{name}.json"
        made = []
        if path.is_file():
            data = json.loads(path.read_text("utf-8"))
            made = list(write(data))
        if not made:
            continue
        sources.append(_source(path.name, data["environment"]))
        for side, found in data.get("sides", {}).items():
            own = found.get("environment") or data["environment"]
            if own["commit"] != data["environment"]["commit"]:
                sources.append(_source(f"{path.name}, {side}", own))
        slow += [replace(item, file=name) for item in slower(data)]
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
    return "\n\n".join([head, "\n".join(sources), *_slower(slow), *blocks])


def _slower(found: Iterable[Slow]) -> Iterable[str]:
    """Where fastprob is slower: form by form, then the other comparisons; the worst first."""
    ordered = sorted(found, key=lambda item: item.ratio)
    header = ["", "at", "fastprob", "the other", "other ÷ fastprob", "file"]

    def lines(same_form: bool) -> list[list[str]]:
        return [
            [item.what, item.at, item.ours, item.other, f"{item.ratio:.2f}", f"`{item.file}.json`"]
            for item in ordered
            if item.same_form == same_form
        ]

    alike, unlike = lines(True), lines(False)
    if alike:
        yield "**Where fastprob is slower than upstream**, form by form, all files:"
        yield _table(header, alike)
    else:
        yield "fastprob is slower than upstream in no case, form by form."
    if unlike:
        what = (
            "Where fastprob in eager mode is slower than upstream compiled or captured, or"
            " hand-written tensors"
        )
        yield _folded(f"{what} ({len(unlike)})", _table(header, unlike))


def _no_slow(data: Json) -> Iterable[Slow]:
    return ()


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
    yield (
        "Graphs that were compiled in the same process have built the noise kernel of a CPU, so "
        "that fastprob's large normal draws use it in eager mode too, as after "
        "`fastprob.native.build()`."
    )
    yield from _refused((titles[row["case"]], row) for row in data["results"])
    yield from _missing((titles[row["case"]], row) for row in data["results"])
    yield from _targets(data, titles)
    yield from _families(data)
    yield from _forms(data)


def _slow_calls(data: Json) -> Iterable[Slow]:
    titles = {row["case"]: row["title"] for row in data["results"]}
    for s in data["slower"]:
        ratio = s["ratio"]["p50"]
        yield Slow("", titles[s["case"]], _shape(s["shape"]), s["fastprob"], s["other"], ratio)


def _refused(rows: Iterable[tuple[str, Json]]) -> Iterable[str]:
    lines = [
        f"- {title}, {_shape(row['shape'])}: {why}"
        for title, row in rows
        for why in row.get("refused", {}).values()
    ]
    if lines:
        yield "**Refused by the gate**, and not timed:"
        yield "\n".join(lines)


def _missing(rows: Iterable[tuple[str, Json]]) -> Iterable[str]:
    lines = [
        f"- {title}, {_shape(row['shape'])}, {name}: {why}"
        for title, row in rows
        for name, why in row.get("missing", {}).items()
    ]
    if lines:
        yield _folded(f"Not timed, and why ({len(lines)})", "\n".join(lines))


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
        kind = STORED.get(kind, kind)
        if gain is None or kind not in KINDS:
            continue
        plain = title.removeprefix("safe ")
        column = ("safe " if plain != title else "") + kind
        shape = _shape(row["shape"])
        if shape not in ("16×8", "4096×8"):
            continue
        shapes.append(shape)
        lines.setdefault(plain, {})[column, shape] = _number(gain)
    filled = {column for cells in lines.values() for column in cells}
    columns = [(kind, shape) for kind in KINDS for shape in _unique(shapes)]
    columns = [column for column in columns if column in filled]
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
    yield from _missing((point["family"], point) for point in data["points"])
    yield "**Scaling**, upstream ÷ fastprob, random value and score, eager:"
    yield _table(
        ["", *shapes],
        [[name, *(cells.get(shape, "") for shape in shapes)] for name, cells in lines.items()],
    )


def _slow_scaling(data: Json) -> Iterable[Slow]:
    for point in data["points"]:
        p50 = {name: spent["p50"] for name, spent in point["providers"].items()}
        for form in ("", " compiled", " graph"):
            ours, other = f"fastprob{form}", f"upstream{form}"
            if {ours, other} <= p50.keys() and p50[other] < p50[ours]:
                at = _shape(point["shape"])
                yield Slow("", point["family"], at, ours, other, p50[other] / p50[ours])


def _train(data: Json) -> Iterable[str]:
    seconds = data["cpu_seconds_median"]
    sides = list(seconds)
    rows = [
        [part, *(f"{seconds[side][part]:.2f}" for side in sides)] for part in seconds["upstream"]
    ]
    returns = (", ".join(f"{r['final_return']:.0f}" for r in data["runs"][side]) for side in sides)
    yield "**PPO on Pendulum-v1** by TorchRL (`python -m bench`), CPU seconds a run:"
    yield _table(["", *sides], [*rows, ["final returns", *returns]])


def _slow_train(data: Json) -> Iterable[Slow]:
    seconds = data["cpu_seconds_median"]
    for part, other in seconds["upstream"].items():
        ours = seconds["fastprob"][part]
        if other < ours:
            yield Slow("", "PPO on Pendulum-v1", part, "fastprob", "upstream", other / ours)


def _loops(data: Json) -> Iterable[str]:
    what = data["unit"].partition(";")[0].removeprefix("steps per second of ")
    yield (
        "**Training loops** (`python -m bench loops`): environment steps collected, and updates"
        f" made, in a second of {what}; fastprob ÷ upstream; returns of the seeds:"
    )
    forms = _unique(item.get("form", "eager") for item in data["loops"])
    for form in forms:
        items = [item for item in data["loops"] if item.get("form", "eager") == form]
        if len(forms) > 1:
            yield "Eager:" if form == "eager" else f"{form[0].upper()}{form[1:]}, both sides:"
        yield _loops_table(items)
        missing = [
            f"- {item['loop']}, {side}, {form}: {why}"
            for item in items
            for side, why in item.get("missing", {}).items()
        ]
        if missing:
            yield "Did not run:"
            yield "\n".join(missing)


def _mujoco(data: Json) -> Iterable[str]:
    frames = data["loops"][0]["runs"]["fastprob"][0]["frames"]
    table = _loops_table(data["loops"])
    what = f"HalfCheetah-v5 (`python -m bench loops --mujoco`), {frames:,} steps, for its speed"
    yield _folded(what, table)


def _loops_table(items: Iterable[Json]) -> str:
    rows = []
    for item in items:
        row = [item["loop"]]
        for part in ("collection", "update"):
            rates = _rates(item, part)
            row += [f"{rates[side]:,.0f}" if side in rates else "" for side in SIDES]
            both = len(rates) == len(SIDES)
            row.append(f"{rates['fastprob'] / rates['upstream']:.2f}" if both else "")
        for side in SIDES:
            row.append(" ".join(f"{run['final_return']:.0f}" for run in item["runs"][side]))
        rows.append([*row, "" if item["goal"] is None else f"≥ {item['goal']:g}"])
    names = [
        name
        for part in ("collection", "update")
        for name in (f"{part}, upstream", f"{part}, fastprob", "ratio")
    ]
    return _table(["", *names, "returns, upstream", "returns, fastprob", "goal"], rows)


def _rates(item: Json, part: str) -> dict[str, float]:
    """Steps a second by side: medians, which older files have without their spread."""
    found = {side: speed[part] for side, speed in item["steps_per_second"].items()}
    return {side: v["p50"] if isinstance(v, dict) else v for side, v in found.items()}


def _slow_loops(data: Json) -> Iterable[Slow]:
    for item in data["loops"]:
        form = item.get("form", "eager")
        suffix = "" if form == "eager" else f" {form}"
        for part in ("collection", "update"):
            rates = _rates(item, part)
            if len(rates) == len(SIDES) and rates["fastprob"] < rates["upstream"]:
                sides = (f"{side}{suffix}" for side in ("fastprob", "upstream"))
                yield Slow("", item["loop"], part, *sides, rates["fastprob"] / rates["upstream"])


# ------------------------------------------------------------------- compiled calls, matrix, graphs


def _compiled(data: Json) -> Iterable[str]:
    """Both sides compiled; then the comparisons of two forms of fastprob, which end in a colon."""
    pairs: dict[str, list[list[str]]] = {}
    for row in data.get("rows", ()):
        what, _, names = row["case"].partition(": ")
        first, second = names.split(", ") if names else SIDES
        goal = row["goal"]
        ratio = f"{row['ratio']:.2f}"
        missed = goal is not None and row["ratio"] < goal
        pairs.setdefault(f"{first}, {second}", []).append(
            [
                _times(what),
                *(_us({"p50": us}) for us in row["us"]),
                f"**{ratio}**" if missed else ratio,
                "" if goal is None else f"≥ {goal:g}",
            ]
        )
    for i, (names, rows) in enumerate(pairs.items()):
        first, second = names.split(", ")
        if i == 0:
            yield (
                "**Compiled calls** (`python -m bench compiled`), µs of CPU time; upstream and"
                " fastprob under `torch.compile`:"
            )
        table = _table(["", first, second, f"{first} ÷ {second}", "goal"], rows)
        yield table if i == 0 else _folded(f"fastprob {first}, and {second}", table)


def _slow_compiled(data: Json) -> Iterable[Slow]:
    for row in data.get("rows", ()):
        if ": " not in row["case"] and row["ratio"] < 1:
            sides = ("fastprob compiled", "upstream compiled")
            yield Slow("", _times(row["case"]), "", *sides, row["ratio"])


def _opaque(data: Json) -> Iterable[str]:
    """What a compiled graph should hold, by family and pass."""
    rows = [
        [
            *(row["family"], row["call"], row["pass"], _shape(row["shape"])),
            *(_us({"p50": row["us"][name]}) for name in ("operator", "Inductor")),
            *(f"{row['ratio']:.2f}", row["decision"]),
            *(_us({"p50": row["us"]["fastprob"]}), f"{row['of_best']:.2f}"),
        ]
        for row in data["rows"]
    ]
    kept = sum(row["decision"] == "operator" for row in data["rows"])
    what = (
        "What a compiled graph should hold (`python -m bench opaque`): an operator in"
        f" {kept} of {len(rows)} cases, where Inductor's code for the formula takes"
        f" {data['limit']:g} times as long; and what fastprob's graph takes, µs"
    )
    header = [
        *("", "", "pass", "shape", "operator", "Inductor", "Inductor ÷ operator", "decision"),
        *("fastprob", "÷ the faster"),
    ]
    yield _folded(what, _table(header, rows))


def _matrix(data: Json) -> Iterable[str]:
    sides = data["sides"]
    names = [side for side in SIDES if side in sides]
    ran = {side: sides[side].get("ran", data.get("cells")) for side in names}
    chosen = (
        "the whole product, as far as it ran"
        if data["strength"] is None
        else f"chosen so that every combination of {data['strength']} choices occurs"
    )
    counts = "; ".join(f"{side} {sides[side]['passed']:,} of {ran[side]:,}" for side in names)
    all_ran = all(n == data["product"] for n in ran.values())
    which = ", and all of them ran" if all_ran else f"; those that ran are {chosen}"
    yield (
        "**What compiles in one graph and equals eager mode**, values, keys and gradients"
        f" (`python -m bench matrix`, {data['backend']}): {counts}. There are"
        f" {data['product']:,} configurations{which}."
    )
    failed = [
        f"- {cell}: {why}" for cell, why in sides.get("fastprob", {}).get("failed", {}).items()
    ]
    if failed:
        yield _folded("Where fastprob fails", "\n".join(failed))
    choices = sides[names[-1]]["by_choice"] if names else {}
    rows = []
    for axis, values in choices.items():
        for value in values:
            passes = (sides[side]["by_choice"].get(axis, {}).get(value) for side in names)
            rows.append([axis, value, *("" if p is None else f"{p[0]} / {p[1]}" for p in passes)])
    if rows:
        yield _folded("Passes by choice", _table(["choice", "", *names], rows))


def _graphs(data: Json) -> Iterable[str]:
    if data["stand-in"]:
        yield (
            "**CUDA graphs** (`python -m bench graphs`): no GPU, so no graph was timed. What the"
            " host does on the way, on the stand-in of the tests, µs of CPU time:"
        )
        rows = [[name, f"{spent['p50']:.2f}"] for name, spent in data["results"].items()]
        yield _table(["an MLP of 3 layers and its head, 16×8", "µs"], rows)
        return
    yield "**CUDA graphs** (`python -m bench graphs`), µs a call of a policy, by batch size:"
    batches = data["results"]
    names = _unique(name for timings in batches.values() for name in timings)
    cells = [[name, *(_us(t.get(name)) for t in batches.values())] for name in names]
    yield _table(["", *batches], cells)
    if data.get("rollouts"):
        yield "Rollouts, environment steps a second:"
        yield _table(
            ["", "environments", "eager", "graph"],
            [
                [r["environment"], str(r["count"]), f"{r['eager']:,.0f}", f"{r['graph']:,.0f}"]
                for r in data["rollouts"]
            ],
        )


def _slow_graphs(data: Json) -> Iterable[Slow]:
    if data["stand-in"]:
        return
    for batch, timings in data["results"].items():
        p50 = {name: spent["p50"] for name, spent in timings.items()}
        for form in ("", " compiled", " graph"):
            ours, other = f"fastprob{form}", f"upstream{form}"
            if {ours, other} <= p50.keys() and p50[other] < p50[ours]:
                what = "policy of `bench graphs`"
                yield Slow("", what, batch, ours, other, p50[other] / p50[ours])


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


def _times(text: str) -> str:
    return re.sub(r"(\d)x(\d)", r"\1×\2", text)


def _number(quantiles: Json) -> str:
    return f"{quantiles['p50']:.2f}"


def _us(quantiles: Json | None) -> str:
    if quantiles is None:
        return ""
    value = quantiles["p50"]
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
