"""The matrix of what compiles in one graph and equals eager mode, upstream beside fastprob.

The cells are those of :mod:`bench.cells`. Each outcome is appended to a file as soon as it is
there, and a later run of the same code goes on after it: the whole product takes hours.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config

from bench import cells as cells_
from bench import results
from bench.cells import Cell, Outcome, check_cell, cover, lean_compiler, product
from bench.implementations import NAMES, Implementation, implementation
from bench.remembering import Remembering

# A process that compiles one cell after the other keeps more of each than it needs, and by its ten
# thousandth took up to 12 s to look for garbage. Cells run in children that end after so many:
# 0.27 s of CPU each where one process takes 0.35 for the first 300. What all of them import and set
# up is there when they begin, as the first few run in the parent.
BATCH = 100
FIRST = 20


def fingerprint(library: Implementation) -> str:
    """A hash of the code that the outcome of a cell depends on.

    Of the parsed sources, without docstrings: of the cells, and of fastprob's own on its side.
    Comments and the kernels, which no CPU runs, do not count.
    """
    paths = [Path(cells_.__file__)]
    if library.name == "fastprob":
        import fastprob

        paths += sorted(Path(fastprob.__file__).parent.rglob("*.py"))
    versions = [metadata.version(name) for name in ("torch", "tensordict", "torchrl")]
    parts = [library.name, sys.version_info[:2], versions]
    parts += [(path.name, ast.dump(_without_docstrings(path.read_text("utf-8")))) for path in paths]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _without_docstrings(text: str) -> ast.AST:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body[0] = ast.Pass()
    return tree


class State:
    """The outcomes so far of one side under one backend, a line of JSON each; a run adds to them.

    Any number of processes may add at a time, each to a file of its own.

    Args:
        folder: of the files of all sides and all versions of the code.
        side: name of the side.
        backend: of ``torch.compile``.
        code: from :func:`fingerprint`; outcomes of other code are not read.
        shard: names the file that this process adds to.
    """

    def __init__(self, folder: Path, side: str, backend: str, code: str, shard: str) -> None:
        self.folder = folder
        self.stem = f"{side}-{backend}-{code}"
        self.path = folder / f"{self.stem}-{shard}.jsonl"
        # The last line of an earlier run may be cut off.
        self.before = "\n"

    def read(self) -> dict[str, dict[str, Any]]:
        """Every outcome so far, by the name of its cell."""
        found = {}
        for path in sorted(self.folder.glob(f"{self.stem}-*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    # Cut off where its process was killed.
                    continue
                found[row["cell"]] = row
        return found

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Appends one outcome; it is on disk when this returns."""
        row = {"cell": str(outcome.cell), "reason": outcome.reason, "s": round(seconds, 3)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{self.before}{json.dumps(row)}\n")
        self.before = ""


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells as a run takes them: those that hold every triple first, the rest by their computation.

    The computations come in random order; cells of one have most of their graphs in common.
    """
    first = set(cover(product(), 3))
    rest = _by_computation([cell for cell in cells if cell not in first])
    random.Random(1).shuffle(rest)
    return [cell for cell in cells if cell in first] + list(itertools.chain.from_iterable(rest))


def part(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """One of ``count`` parts of cells in order, the first of which is 1: whole computations."""
    return list(itertools.chain.from_iterable(_by_computation(cells)[index - 1 :: count]))


def _by_computation(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells in order, those together that follow each other and compute the same."""
    runs = itertools.groupby(cells, lambda c: (c.family, c.interaction, c.score, c.spec))
    return [list(run) for _, run in runs]


# ------------------------------------------------------------------------------------- command


def run(args: argparse.Namespace) -> int:
    """Runs the matrix on both sides, prints their passes and writes the JSON.

    With one side alone the other is what the record has, if that is of the very code.
    """
    warnings.simplefilter("ignore")
    # Upstream's failures make dynamo print traces of the operators that fail.
    logging.disable(logging.ERROR)
    torch.set_num_threads(args.threads)
    every = product()
    strength = 2 if args.quick else args.strength
    if args.unless_recorded and recorded(every, args.backend):
        print("on record for this very code: all of the product. Again, what holds every triple")
        strength = 3
    elif args.unless_recorded:
        print("there is no record of all of the product for this very code")
        args.full = True
    whole = args.full or strength >= len(vars(every[0]))
    cells = in_order(every if whole else cover(every, strength))
    index, count = args.shard
    minutes = math.inf if args.minutes is None else args.minutes
    print(f"{len(every):,} cells in the product, {len(cells):,} of them wanted, {args.backend}")
    payload: dict[str, Any] = {
        "environment": results.environment(),
        "backend": args.backend,
        "product": len(every),
        "strength": None if whole else strength,
        "cells": len(cells),
        "sides": {},
    }
    for name in NAMES if args.side is None else (args.side,):
        library = implementation(name)
        code = fingerprint(library)
        state = State(args.state, name, args.backend, code, f"{index}of{count}")
        wanted = part(cells, index, count)
        interrupted = _run_side(wanted, library, args.backend, state, minutes)
        found = state.read()
        payload["sides"][name] = summary(cells, found) | {
            "version": library.version,
            "code": code,
            "environment": payload["environment"],
        }
        if interrupted:
            break
    if args.side is not None:
        found = payload["sides"] | _on_record(args.backend, {args.side})
        payload["sides"] = {name: found[name] for name in NAMES if name in found}
    _print_table(payload["sides"])
    ours = payload["sides"].get("fastprob", {"failed": {}})
    for name, reason in ours["failed"].items():
        print(f"fastprob fails: {name}: {reason[:300]}")
    if args.out is not None or not (args.quick or args.side):
        folder = args.out or results.default_folder()
        print(f"written: {results.shown(results.write(folder / 'matrix.json', payload))}")
    return int(bool(ours["failed"]))


def recorded(cells: Sequence[Cell], backend: str) -> bool:
    """Whether the result on record says that fastprob's code as it is passes all of the cells.

    Args:
        cells: the product.
        backend: of ``torch.compile``.
    """
    side = _on_record(backend).get("fastprob")
    return side is not None and side["ran"] == side["passed"] == len(cells)


def _on_record(backend: str, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The sides whose result on record is of the very code, each with the environment of its run.

    Args:
        backend: of ``torch.compile``.
        but: names of sides that are left out.
    """
    path = results.default_folder() / "matrix.json"
    if not path.exists():
        return {}
    data = json.loads(path.read_text("utf-8"))
    if data["backend"] != backend:
        return {}
    # Of all that stand in one file, the file's own environment is that of the last run.
    return {
        name: {"environment": data.get("environment")} | side
        for name, side in data["sides"].items()
        if name not in but and side.get("code") == fingerprint(implementation(name))
    }


def _run_side(
    cells: Sequence[Cell],
    library: Implementation,
    backend: str,
    state: State,
    minutes: float,
) -> bool:
    """Runs the cells that have no outcome yet; returns whether it was interrupted."""
    known = state.read()
    missing = [cell for cell in cells if str(cell) not in known]
    print(f"{library.name}: {len(cells) - len(missing):,} known, {len(missing):,} to run")
    began = told = time.monotonic()
    until = began + 60 * minutes
    # A collection after every compilation: 0.11 of a cell's time (60 cells, four times each).
    with lean_compiler(), config.patch(run_gc_after_compile=False):
        try:
            _run_cells(missing[:FIRST], library, backend, state, until)
            gc.collect()
            gc.freeze()
            for done in range(FIRST, len(missing), BATCH):
                if time.monotonic() >= until:
                    break
                batch = missing[done : done + BATCH]
                _in_child(batch, library, backend, state, until)
                if time.monotonic() - told >= 60:
                    told = time.monotonic()
                    done += len(batch)
                    left = (told - began) / done * (len(missing) - done) / 60
                    failed = sum(row["reason"] is not None for row in state.read().values())
                    print(
                        f"{library.name}: {done:,} of {len(missing):,}, {failed:,} of all fail, "
                        f"{left:.0f} min left",
                        flush=True,
                    )
        except KeyboardInterrupt:
            print("interrupted: the next run goes on from here")
            return True
    return False


def _run_cells(
    cells: Sequence[Cell], library: Implementation, backend: str, state: State, until: float
) -> None:
    """Runs cells until a time of the monotonic clock."""
    remembering: Any = Remembering(backend)
    for cell in cells:
        if time.monotonic() >= until:
            return
        start = time.process_time()
        outcome = check_cell(cell, library, remembering)
        state.add(outcome, time.process_time() - start)


def _in_child(
    cells: Sequence[Cell], library: Implementation, backend: str, state: State, until: float
) -> None:
    """Runs cells in a copy of this process.

    Raises:
        KeyboardInterrupt: if the copy was interrupted.
        RuntimeError: if it ended otherwise than by itself.
    """

    def run() -> None:
        try:
            _run_cells(cells, library, backend, state, until)
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)

    sys.stdout.flush()
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    try:
        child.join()
    finally:
        # Of an interruption that only this process was sent.
        child.kill()
        child.join()
    if child.exitcode == _INTERRUPTED:
        raise KeyboardInterrupt
    if child.exitcode != 0:
        raise RuntimeError(
            f"a process that ran cells ended with status {child.exitcode}; the first without an "
            f"outcome is the one it ran: {state.path}"
        )


# As shells have it of a process that SIGINT has ended.
_INTERRUPTED = 130


def summary(cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What came of the cells of one side that have run.

    Args:
        cells: those wanted.
        found: outcomes by name, from :meth:`State.read`.

    Returns:
        ``ran``, ``passed``, ``seconds`` of CPU time, ``by_choice``, ``reasons``: how many cells
        failed for each of the 30 commonest, and ``failed``: the reasons by cell, the first 100.
    """
    rows = [(cell, found[str(cell)]) for cell in cells if str(cell) in found]
    outcomes = [Outcome(cell, row["reason"]) for cell, row in rows]
    failed = {str(o.cell): o.reason[:200] for o in outcomes if o.reason is not None}
    # What differs from cell to cell in one reason is numbers, and what stands in brackets.
    kinds = Counter(re.sub(r"\[.*|\(.*|tensor.*|\d+", "…", r)[:120] for r in failed.values())
    return {
        "ran": len(rows),
        "passed": len(rows) - len(failed),
        "seconds": round(sum(row["s"] for _, row in rows), 1),
        "by_choice": _by_choice(outcomes),
        "reasons": dict(kinds.most_common(30)),
        "failed": dict(itertools.islice(failed.items(), 100)),
    }


def _by_choice(outcomes: Sequence[Outcome]) -> dict[str, dict[str, list[int]]]:
    """Passes and cells of every value of every choice."""
    passed: dict[str, Counter[str]] = {}
    total: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for axis, value in vars(outcome.cell).items():
            total.setdefault(axis, Counter())[str(value)] += 1
            passed.setdefault(axis, Counter())[str(value)] += outcome.reason is None
    return {
        axis: {value: [passed[axis][value], n] for value, n in values.items()}
        for axis, values in total.items()
    }


def _print_table(sides: dict[str, Any]) -> None:
    for name, side in sides.items():
        print(
            f"{name:9} {side['passed']:6,} of {side['ran']:,} pass ({side['seconds']:.0f} s of CPU)"
        )
    first = next(iter(sides.values()))["by_choice"]
    for axis, values in first.items():
        print(f"\n{axis:26}" + "".join(f"{name:>14}" for name in sides))
        for value in values:
            counts = (side["by_choice"].get(axis, {}).get(value, (0, 0)) for side in sides.values())
            print(f"  {value:24}" + "".join(f"{f'{p} / {n}':>14}" for p, n in counts))
