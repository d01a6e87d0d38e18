"""What compiles in one graph and equals eager mode: families x types x specs x noise x forms.

A cell is one configuration of a module and one way to call it. It passes where its call compiles
with ``fullgraph=True`` and gives the values, the keys and the gradients of the eager call, drawn
from the same streams; where the eager call raises, the compiled one must raise with the same words.
The whole product takes an hour; :func:`cover` picks cells in which every combination of any three
of the six choices occurs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    TensorDictModule,
    set_interaction_type,
    set_skip_existing,
)
from torch import Tensor

from bench import results
from bench.implementations import NAMES, Implementation, implementation

TYPES = tuple(t.value for t in InteractionType.__members__.values())
SOURCES = ("none", "int", "generator", "key")
FORMS = (
    "plain",
    "num_samples",
    "nested keys",
    "composite",
    "sequence",
    "tensordict_out",
    "type set outside",
    "type set inside",
    "skip existing",
)
ROWS, WIDTH = 4, 3
SEED = 17


@dataclass(frozen=True)
class Cell:
    """One configuration and one way to call it.

    Attributes:
        family: name of the distribution.
        interaction: how the value is taken.
        score: whether the log-probability is written.
        spec: what a safe module projects onto, "none" for a module without a spec.
        source: the ``generator=`` argument.
        form: how the module is built and called.
    """

    family: str
    interaction: str
    score: bool
    spec: str
    source: str
    form: str

    def __str__(self) -> str:
        """The choices, in the order of the attributes."""
        return " / ".join(map(str, vars(self).values()))


# ------------------------------------------------------------------------------- distributions


def _real(*names: str) -> Callable[[Any], dict[str, Tensor]]:
    return lambda draw: {name: torch.randn(ROWS, WIDTH, generator=draw) for name in names}


def _loc_scale(draw: Any) -> dict[str, Tensor]:
    return {
        "loc": torch.randn(ROWS, WIDTH, generator=draw).mul_(0.5),
        "scale": torch.rand(ROWS, WIDTH, generator=draw).add_(0.2),
    }


def _concentrations(draw: Any) -> dict[str, Tensor]:
    names = ("concentration1", "concentration0")
    return {name: torch.rand(ROWS, WIDTH, generator=draw).add_(1.0) for name in names}


def _masked(draw: Any) -> dict[str, Tensor]:
    mask = torch.rand(ROWS, WIDTH, generator=draw) < 0.6
    mask[:, 1] = True
    return {**_real("logits")(draw), "mask": mask}


BOX = ("bounded", "bounded each", "unbounded")
INDEX = ("categorical", "masked categorical")
ONE_HOT = ("one hot", "masked one hot")
EVERY = (*BOX, *INDEX, *ONE_HOT, "multi categorical", "multi one hot", "binary")


@dataclass(frozen=True)
class Family:
    """A distribution: its parameters, its keywords, and the specs of its values."""

    params: Callable[[Any], dict[str, Tensor]]
    specs: tuple[str, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "Normal": Family(_loc_scale, BOX),
    "IndependentNormal": Family(_loc_scale, BOX),
    "TanhNormal": Family(_loc_scale, BOX),
    "TruncatedNormal": Family(_loc_scale, BOX, (("low", -1.0), ("high", 1.0))),
    # Its values are whatever they are: onto every spec.
    "Delta": Family(_real("param"), EVERY),
    "TanhDelta": Family(_real("param"), BOX),
    "Categorical": Family(_real("logits"), INDEX),
    "OneHotCategorical": Family(_real("logits"), ONE_HOT),
    "MaskedCategorical": Family(_masked, INDEX),
    "MaskedOneHotCategorical": Family(_masked, ONE_HOT),
    "Ordinal": Family(_real("scores"), INDEX),
    "OneHotOrdinal": Family(_real("scores"), ONE_HOT),
    "Bernoulli": Family(_real("logits"), ("binary",)),
    "Beta": Family(_concentrations, BOX),
    # A Normal and a Categorical, each with a spec of its own.
    "Composite": Family(_loc_scale, ("both",)),
}


def _spec(library: Implementation, name: str) -> Any:
    specs = library.specs
    mask = torch.tensor([True, False, True])
    low = torch.tensor([-1.0, -0.5, 0.0])
    if name == "binary":
        return specs.Binary(WIDTH, dtype=torch.float32)
    return {
        "bounded": lambda: specs.Bounded(-0.5, 0.5, shape=(WIDTH,)),
        "bounded each": lambda: specs.Bounded(low, low + 1.0, shape=(WIDTH,)),
        "unbounded": lambda: specs.Unbounded(shape=(WIDTH,)),
        "categorical": lambda: specs.Categorical(WIDTH),
        "masked categorical": lambda: specs.Categorical(WIDTH, mask=mask),
        "one hot": lambda: specs.OneHot(WIDTH),
        "masked one hot": lambda: specs.OneHot(WIDTH, mask=mask),
        "multi categorical": lambda: specs.MultiCategorical([2, 3, 4]),
        "multi one hot": lambda: specs.MultiOneHot([1, 2]),
    }[name]()


# --------------------------------------------------------------------------------------- cells


def product() -> list[Cell]:
    """Every cell, in a fixed order."""
    found = []
    for name, family in FAMILIES.items():
        choices = (TYPES, (False, True), ("none", *family.specs), SOURCES, FORMS)
        found += [Cell(name, *choice) for choice in itertools.product(*choices)]
    return found


def cover(cells: Sequence[Cell], strength: int) -> list[Cell]:
    """Some of the cells, in which every combination of a few choices occurs.

    Greedy, in an order that is the same each time: cells that add many combinations come first.

    Args:
        cells: to choose from.
        strength: how many choices a combination has: with 2, every pair of values of two choices
            that one of the cells has is in one of the chosen.
    """
    order = list(cells)
    random.Random(0).shuffle(order)
    combinations = [set(itertools.combinations(vars(c).items(), strength)) for c in order]
    missing = set().union(*combinations)
    most = math.comb(len(vars(order[0])), strength)
    kept: set[Cell] = set()
    while missing:
        for cell, own in zip(order, combinations, strict=True):
            new = own & missing
            if len(new) >= most:
                kept.add(cell)
                missing -= new
        most = max(1, most - 1 - most // 8)
    return [cell for cell in cells if cell in kept]


# --------------------------------------------------------------------------------------- calls


class Call:
    """The module of a cell and its call, as a function of tensors to tensors."""

    def __init__(self, cell: Cell, library: Implementation) -> None:
        family = FAMILIES[cell.family]
        self.cell = cell
        draw = torch.Generator().manual_seed(SEED)
        params = family.params(draw)
        kwargs = dict(family.kwargs)
        config: dict[str, Any] = {
            "default_interaction_type": cell.interaction,
            "return_log_prob": cell.score,
        }
        if cell.source != "none":
            config["generator"] = {
                "int": SEED,
                "generator": torch.Generator().manual_seed(SEED),
                "key": "seed",
            }[cell.source]
        if cell.form == "num_samples":
            config["num_samples"] = 2
        if cell.form in ("type set outside", "type set inside"):
            other = "random" if cell.interaction == "mode" else "mode"
            config["default_interaction_type"] = other
        if cell.family == "Composite" or cell.form == "composite":
            # The component under test beside a Normal, in front of it.
            if cell.family == "Composite":
                parts: dict[Any, Any] = {"a": library.Normal, "b": library.Categorical}
                inputs: dict[Any, Tensor] = {("params", "a", k): v for k, v in params.items()}
                inputs["params", "b", "logits"] = _real("logits")(draw)["logits"]
                first = {"a": "bounded", "b": "categorical"}
            else:
                parts = {"x": getattr(library, cell.family)}
                inputs = {("params", "x", k): v for k, v in params.items()}
                first = {"x": cell.spec}
            if cell.form == "composite":
                parts["y"] = library.Normal
                inputs |= {("params", "y", k): v for k, v in _loc_scale(draw).items()}
            config["distribution_class"] = library.CompositeDistribution
            config["distribution_kwargs"] = {"distribution_map": parts}
            if kwargs:
                config["distribution_kwargs"]["extra_kwargs"] = {"x": kwargs}
            in_keys: Any = ["params"]
            out_keys: Any = list(parts)
            spec = (
                {k: _spec(library, first[k]) if k in first else None for k in parts}
                if (cell.spec != "none")
                else {}
            )
        else:
            inputs = dict(params)
            in_keys, out_keys = list(params), ["action"]
            config["distribution_class"] = getattr(library, cell.family)
            config["distribution_kwargs"] = kwargs
            spec = {} if cell.spec == "none" else {"action": _spec(library, cell.spec)}
        if cell.form == "nested keys":
            if in_keys == ["params"]:
                inputs = {("agent", *k): v for k, v in inputs.items()}
                in_keys = {"params": ("agent", "params")}
            else:
                in_keys = {k: ("agent", k) for k in in_keys}
                inputs = {("agent", k): v for k, v in inputs.items()}
                out_keys = [("agent", "action")]
                spec = {("agent", "action"): spec["action"]} if spec else {}
                if cell.score:
                    config["log_prob_key"] = ("agent", "score")
        self.inputs = inputs
        if spec:
            composite = library.specs.Composite(spec)
            head = library.SafeProbabilisticModule(
                in_keys, out_keys, composite, safe=True, **config
            )
        else:
            head = library.ProbabilisticTensorDictModule(in_keys, out_keys, **config)
        self.written = list(head.out_keys)
        self.module = head
        if cell.form == "sequence":
            net = TensorDictModule(_net, list(inputs), list(inputs))
            kind = library.ProbabilisticTensorDictSequential
            self.module = kind(net, head)

    def fresh_inputs(self) -> dict[Any, Tensor]:
        """The input tensors as leaves of a new autograd graph."""
        return {
            k: v.clone().requires_grad_() if v.is_floating_point() else v.clone()
            for k, v in self.inputs.items()
        }

    def __call__(self, inputs: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """Makes the call; the results by key."""
        cell = self.cell
        keyed = cell.source == "key"
        td = TensorDict({}, [] if keyed else [ROWS])
        for key, value in inputs.items():
            td.set(key, value)
        if keyed:
            td.set("seed", torch.full((), SEED, dtype=torch.int64))
        if cell.form == "tensordict_out":
            out = self.module(td, TensorDict({}, td.batch_size))
        elif cell.form == "type set inside":
            with set_interaction_type(cell.interaction):
                out = self.module(td)
        else:
            out = self.module(td)
            if cell.form == "skip existing":
                out = self.module(out)
        found = {key: out.get(key) for key in self.written}
        if keyed:
            found["seed"] = td.get("seed")
        return found


def _net(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x * 0.9 if x.is_floating_point() else x for x in inputs)


@dataclass
class Ran:
    """What a call gave: values and gradients by key."""

    values: dict[Any, Tensor]
    grads: dict[Any, Tensor | None]


def _finish(inputs: dict[Any, Tensor], values: dict[Any, Tensor]) -> Ran:
    """Runs the backward pass from everything that has a gradient and is finite."""
    loss: Any = 0.0
    for i, value in enumerate(values.values()):
        if value.requires_grad and value.detach().isfinite().all():
            weights = torch.linspace(0.5, 1.5 + i, value.numel(), dtype=value.dtype)
            loss = loss + (value.reshape(-1) * weights).sum()
    if isinstance(loss, Tensor):
        loss.backward()
    return Ran({k: v.detach() for k, v in values.items()}, {k: v.grad for k, v in inputs.items()})


def difference(eager: Ran, compiled: Ran) -> str | None:
    """How two runs of a call differ, None where they agree within float32's rounding."""
    if list(eager.values) != list(compiled.values):
        return f"keys {list(compiled.values)}, eager {list(eager.values)}"
    for what in ("values", "grads"):
        for key, expected in getattr(eager, what).items():
            found = getattr(compiled, what)[key]
            if (expected is None) != (found is None):
                return f"{what} of {key}: {found}, eager {expected}"
            if expected is None:
                continue
            try:
                torch.testing.assert_close(found, expected, equal_nan=True)
            except AssertionError as err:
                return f"{what} of {key}: {' '.join(str(err).split())}"
    return None


# ------------------------------------------------------------------------------------- running


@dataclass
class Outcome:
    """What came of a cell: ``reason`` is None where it passed."""

    cell: Cell
    reason: str | None


def check(
    cells: Sequence[Cell],
    library: Implementation,
    backend: str = "aot_eager",
    batch: int = 25,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Compiles cells and compares them with eager mode.

    Args:
        cells: the cells.
        library: whose modules.
        backend: of ``torch.compile``.
        batch: how many calls one graph holds. They draw from one stream after another, so that
            their order counts as well. Where one of them fails, they are tried one by one.
        progress: told the number of cells done.
    """
    outcomes: dict[Cell, Outcome] = {}
    raising, running = [], []
    for cell in cells:
        error = _eager_error(cell, library)
        (running if error is None else raising).append((cell, error))
    done = 0
    for group in _groups([cell for cell, _ in running], batch):
        outcomes.update({o.cell: o for o in _check_group(group, library, backend)})
        done += len(group)
        if progress is not None:
            progress(done)
    for cell, error in raising:
        outcomes[cell] = _check_error(cell, library, backend, error)
        done += 1
        if progress is not None:
            progress(done)
    return [outcomes[cell] for cell in cells]


def _groups(cells: list[Cell], batch: int) -> Iterator[list[Cell]]:
    """Batches whose cells are called under the same switches."""
    by_switch: dict[Any, list[Cell]] = {}
    for cell in cells:
        by_switch.setdefault(_outside(cell), []).append(cell)
    for group in by_switch.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def _outside(cell: Cell) -> str | None:
    """What is in force around the compiled call."""
    if cell.form == "type set outside":
        return cell.interaction
    # tensordict's switch cannot be set inside a compiled region.
    return cell.form if cell.form == "skip existing" else None


def _switched(cell: Cell) -> contextlib.AbstractContextManager[Any]:
    outside = _outside(cell)
    if outside is None:
        return contextlib.nullcontext()
    return set_skip_existing(True) if outside == cell.form else set_interaction_type(outside)


def _eager_error(cell: Cell, library: Implementation) -> Exception | None:
    try:
        call = Call(cell, library)
        inputs = call.fresh_inputs()
        with _switched(cell):
            _finish(inputs, call(inputs))
    except Exception as err:
        return err
    return None


def _run(calls: Sequence[Call], run: Callable[..., Any]) -> list[Ran]:
    torch.manual_seed(SEED)
    inputs = [call.fresh_inputs() for call in calls]
    with _switched(calls[0].cell):
        found = run(inputs)
    return [_finish(i, f) for i, f in zip(inputs, found, strict=True)]


def _check_group(group: list[Cell], library: Implementation, backend: str) -> list[Outcome]:
    eager = [Call(cell, library) for cell in group]
    expected = _run(eager, lambda inputs: [c(i) for c, i in zip(eager, inputs, strict=True)])
    compiled = [Call(cell, library) for cell in group]

    def together(inputs: list[Any]) -> list[Any]:
        return [call(i) for call, i in zip(compiled, inputs, strict=True)]

    torch._dynamo.reset()
    try:
        found = _run(compiled, torch.compile(together, backend=backend, fullgraph=True))
        differences = [difference(e, f) for e, f in zip(expected, found, strict=True)]
    except Exception as err:
        differences = [f"{type(err).__name__}: {_first_line(err)}"] * len(group)
    if len(group) > 1 and any(differences):
        return [o for cell in group for o in _check_group([cell], library, backend)]
    return [Outcome(c, d) for c, d in zip(group, differences, strict=True)]


def _check_error(cell: Cell, library: Implementation, backend: str, error: Any) -> Outcome:
    """The compiled call must raise with the words of the eager one."""
    said = _first_line(error)
    try:
        call = Call(cell, library)
    except Exception as err:
        return Outcome(cell, None if _first_line(err) == said else f"does not build: {err}")
    torch._dynamo.reset()
    try:
        _run([call], torch.compile(lambda i: [call(i[0])], backend=backend, fullgraph=True))
    except Exception as err:
        chain, texts = err, []
        while chain is not None:
            texts.append(str(chain))
            chain = chain.__cause__ or chain.__context__
        if any(said in text for text in texts):
            return Outcome(cell, None)
        return Outcome(cell, f"eager says {said!r}, compiled {_first_line(err)!r}")
    return Outcome(cell, f"eager raises {said!r}, compiled does not")


def _first_line(err: BaseException) -> str:
    said = err.args[0] if isinstance(err, KeyError) and err.args else str(err)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__


# ------------------------------------------------------------------------------------- command


def run(args: argparse.Namespace) -> int:
    """Runs the matrix on both sides, prints their passes and writes the JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    every = product()
    cells = every if args.full else cover(every, 2 if args.quick else args.strength)
    print(f"{len(every):,} cells in the product, {len(cells):,} of them run, {args.backend}")
    sides = NAMES if args.side is None else (args.side,)
    payload: dict[str, Any] = {
        "environment": results.environment(),
        "backend": args.backend,
        "product": len(every),
        "strength": None if args.full else args.strength,
        "cells": len(cells),
        "sides": {},
    }
    ours: list[Outcome] = []
    for name in sides:
        library = implementation(name)
        began = time.perf_counter()
        # A draw that differs shifts what comes after it: upstream's cells run one by one.
        batch = 25 if name == "fastprob" else 1
        outcomes = check(cells, library, args.backend, batch, _progress(name, len(cells)))
        seconds = time.perf_counter() - began
        passed = sum(o.reason is None for o in outcomes)
        if name == "fastprob":
            ours = outcomes
        payload["sides"][name] = {
            "version": library.version,
            "passed": passed,
            "seconds": round(seconds, 1),
            "by_choice": _by_choice(outcomes),
            "failed": {str(o.cell): o.reason for o in outcomes if o.reason is not None},
        }
        print(f"{name:9} {passed:6,} of {len(cells):,} pass ({seconds:.0f} s)")
    _print_table(payload["sides"])
    for outcome in ours:
        if outcome.reason is not None:
            print(f"fastprob fails: {outcome.cell}: {outcome.reason[:300]}")
    if args.out is not None or not (args.quick or args.full or args.side):
        folder = args.out or results.default_folder()
        print(f"written: {results.shown(results.write(folder / 'matrix.json', payload))}")
    return int(any(o.reason is not None for o in ours))


def _progress(name: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {done} of {total}", end="", file=sys.stderr)

    return show


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
    first = next(iter(sides.values()))["by_choice"]
    for axis, values in first.items():
        print(f"\n{axis:26}" + "".join(f"{name:>14}" for name in sides))
        for value in values:
            counts = (side["by_choice"][axis][value] for side in sides.values())
            print(f"  {value:24}" + "".join(f"{f'{p} / {n}':>14}" for p, n in counts))
