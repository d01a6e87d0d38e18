"""What compiles in one graph and equals eager mode: families x types x specs x noise x forms.

A cell is one configuration of a module and one way to call it. It passes where its call compiles
with ``fullgraph=True`` and gives the values, the keys and the gradients of the eager call, drawn
from the same streams; where the eager call raises, the compiled one must raise with the same words.
:func:`cover` picks cells in which every combination of any few of the six choices occurs.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
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

from bench.implementations import Implementation

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


def finish(inputs: dict[Any, Tensor], values: dict[Any, Tensor]) -> Ran:
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
    cells: Sequence[Cell], library: Implementation, backend: str = "aot_eager"
) -> list[Outcome]:
    """Compiles cells, each by itself, and compares them with eager mode.

    Args:
        cells: the cells.
        library: whose modules.
        backend: of ``torch.compile``.
    """
    with lean_compiler() as tidy:
        outcomes = []
        for cell in cells:
            outcomes.append(check_cell(cell, library, backend))
            tidy()
    return outcomes


def check_cell(cell: Cell, library: Implementation, backend: str = "aot_eager") -> Outcome:
    """Compiles one cell and compares it with eager mode; see :func:`check`."""
    try:
        expected = _run(Call(cell, library), lambda call: call)
    except Exception as err:
        return _check_error(cell, library, backend, err)
    try:
        found = _run(Call(cell, library), lambda call: _compiled(call, backend))
    except Exception as err:
        return Outcome(cell, f"{type(err).__name__}: {_first_line(err)}")
    for name, e, f in zip(("", "second call: ", "after it: "), expected, found, strict=True):
        reason = difference(e, f)
        if reason is not None:
            return Outcome(cell, name + reason)
    return Outcome(cell, None)


@contextlib.contextmanager
def lean_compiler() -> Iterator[Callable[[], None]]:
    """Leaves out of a compilation what is no part of the result; gives a function for between.

    In one run, 96 cells, the CPU time of a cell: collecting garbage by hand every 50 cells and not
    while tracing 0.85 of what it was, no profile of the shapes seen on disk 0.97, no timing of the
    guards with flushed caches 0.98; all of it 0.77 (0.33 s to 0.25 s).
    """
    from torch._dynamo import config, guards

    done = 0

    def tidy() -> None:
        nonlocal done
        done += 1
        if done % 50 == 0:
            gc.collect()

    with contextlib.ExitStack() as stack:
        if hasattr(config, "automatic_dynamic_local_pgo"):
            stack.enter_context(config.patch(automatic_dynamic_local_pgo=False))
        timing = getattr(guards, "profile_guard_manager", None)
        if timing is not None:
            guards.profile_guard_manager = lambda *_: 0.0
            stack.callback(setattr, guards, "profile_guard_manager", timing)
        if gc.isenabled():
            gc.disable()
            stack.callback(gc.enable)
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield tidy


def _switched(cell: Cell) -> contextlib.AbstractContextManager[Any]:
    """What is in force around the compiled call."""
    if cell.form == "type set outside":
        return set_interaction_type(cell.interaction)
    # tensordict's switch cannot be set inside a compiled region.
    if cell.form == "skip existing":
        return set_skip_existing(True)
    return contextlib.nullcontext()


def _compiled(call: Call, backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(lambda inputs: call(inputs), backend=backend, fullgraph=True)


def _run(call: Call, prepare: Callable[[Call], Callable[..., Any]]) -> list[Ran]:
    """Two calls, the second of which goes on in the streams, and what torch's stream gives then."""
    run = prepare(call)
    torch.manual_seed(SEED)
    made = []
    for _ in range(2):
        inputs = call.fresh_inputs()
        with _switched(call.cell):
            found = run(inputs)
        made.append(finish(inputs, found))
    return [*made, Ran({"torch's stream": torch.rand(4)}, {})]


def _check_error(cell: Cell, library: Implementation, backend: str, error: Exception) -> Outcome:
    """The compiled call must raise with the words of the eager one."""
    said = _first_line(error)
    try:
        call = Call(cell, library)
    except Exception as err:
        return Outcome(cell, None if _first_line(err) == said else f"does not build: {err}")
    try:
        _run(call, lambda call: _compiled(call, backend))
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
