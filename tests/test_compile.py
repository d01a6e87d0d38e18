"""What compiles in one graph and equals eager mode, and how often it is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import fastprob as fp
from bench import cells as matrix
from bench.implementations import implementation
from fastprob.specs import Bounded
from tests._modules import TYPES, head, normal_td

CELLS = matrix.product()
PAIRS = matrix.cover(CELLS, 2)
# Every family once; noise from each source, by each kind of call.
CHOSEN = [
    matrix.Cell("Normal", "random", True, "bounded each", "none", "plain"),
    matrix.Cell("IndependentNormal", "random", True, "bounded", "key", "sequence"),
    matrix.Cell("TanhNormal", "random", True, "none", "int", "nested keys"),
    matrix.Cell("TruncatedNormal", "random", True, "none", "generator", "composite"),
    matrix.Cell("Delta", "mode", True, "bounded", "none", "plain"),
    matrix.Cell("TanhDelta", "deterministic", True, "bounded", "none", "tensordict_out"),
    matrix.Cell("Categorical", "random", True, "categorical", "int", "num_samples"),
    matrix.Cell("OneHotCategorical", "random", True, "masked one hot", "key", "plain"),
    matrix.Cell("MaskedCategorical", "random", True, "none", "generator", "plain"),
    matrix.Cell("MaskedOneHotCategorical", "mode", True, "one hot", "none", "sequence"),
    matrix.Cell("Ordinal", "random", True, "masked categorical", "none", "nested keys"),
    matrix.Cell("OneHotOrdinal", "random", True, "none", "int", "type set inside"),
    matrix.Cell("Bernoulli", "random", True, "binary", "generator", "num_samples"),
    matrix.Cell("Beta", "random", True, "none", "none", "plain"),
    matrix.Cell("Composite", "random", True, "both", "key", "plain"),
]


def by_family(cells: list[matrix.Cell]) -> dict[str, list[matrix.Cell]]:
    found: dict[str, list[matrix.Cell]] = {}
    for cell in cells:
        found.setdefault(cell.family, []).append(cell)
    return found


# --- the matrix ---


@pytest.mark.filterwarnings("ignore:.*has no deterministic_sample:UserWarning")
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_every_pair_of_choices_compiles_in_one_graph_and_equals_eager(family):
    outcomes = matrix.check(by_family(PAIRS)[family], implementation("fastprob"), "aot_eager")
    assert outcomes
    assert [f"{o.cell}: {o.reason}" for o in outcomes if o.reason is not None] == []


def test_every_family_under_inductor_equals_eager_in_both_passes():
    """All in one graph, so that the order of their draws counts as well."""
    assert [cell.family for cell in CHOSEN] == list(matrix.FAMILIES)

    def results(prepare):
        calls = [matrix.Call(cell, implementation("fastprob")) for cell in CHOSEN]
        run = prepare(lambda inputs: [c(i) for c, i in zip(calls, inputs, strict=True)])
        torch.manual_seed(0)
        inputs = [call.fresh_inputs() for call in calls]
        found = run(inputs)
        # The graph has one backward pass for all.
        return matrix.finish(flat(inputs), flat(found))

    def flat(parts):
        return {(str(c), k): v for c, p in zip(CHOSEN, parts, strict=True) for k, v in p.items()}

    torch._dynamo.reset()
    expected = results(lambda run: run)
    found = results(lambda run: torch.compile(run, backend="inductor", fullgraph=True))
    assert matrix.difference(expected, found) is None
    differentiated = {cell for (cell, _), grad in expected.grads.items() if grad is not None}
    assert differentiated == {str(cell) for cell in CHOSEN}


@pytest.mark.parametrize(
    ("family", "interaction"),
    [
        ("TanhNormal", "mode"),
        ("TanhNormal", "mean"),
        ("TruncatedNormal", "mean"),
        ("Beta", "median"),
    ],
)
def test_points_found_in_many_steps_under_inductor(family, interaction):
    cell = matrix.Cell(family, interaction, True, "none", "none", "plain")
    (outcome,) = matrix.check([cell], implementation("fastprob"), "inductor")
    assert outcome.reason is None


def test_the_cells_hold_every_pair():
    def pairs(cells):
        return {(a, b) for c in cells for a in vars(c).items() for b in vars(c).items() if a < b}

    assert pairs(PAIRS) == pairs(CELLS)
    assert len(PAIRS) < 200
    assert len(CELLS) == sum(
        5 * 2 * (1 + len(f.specs)) * 4 * len(matrix.FORMS) for f in matrix.FAMILIES.values()
    )


@pytest.mark.parametrize("spoil", ["value", "gradient", "key", "stream", "break", "silence"])
def test_the_check_notices(spoil, monkeypatch):
    """A call that is not the same compiled as eager fails, however it differs."""
    score = spoil == "silence"
    family = "OneHotCategorical" if score else "Normal"
    kind = "mean" if score else "mode"
    cell = matrix.Cell(family, kind, score, "none", "none", "plain")
    honest = matrix.Call.__call__

    def spoiled(self, inputs):
        if not torch.compiler.is_compiling():
            return honest(self, inputs)
        if spoil == "silence":
            return {}
        found = honest(self, inputs)
        if spoil == "value":
            return {k: v + 1e-3 for k, v in found.items()}
        if spoil == "gradient":
            return {k: v.detach() + 2 * (v - v.detach()) for k, v in found.items()}
        if spoil == "stream":
            return {k: v + 0 * torch.rand(()) for k, v in found.items()}
        if spoil == "key":
            return {**found, "more": inputs["loc"]}
        torch._dynamo.graph_break()
        return found

    monkeypatch.setattr(matrix.Call, "__call__", spoiled)
    (outcome,) = matrix.check([cell], implementation("fastprob"), "aot_eager")
    assert outcome.reason is not None


# --- how often ---


class Counted:
    """`torch.compile` of a callable, counting the graphs."""

    def __init__(self, **options: Any) -> None:
        torch._dynamo.reset()
        self.backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        self.options = options

    def __call__(self, module: Any) -> Any:
        return torch.compile(module, backend=self.backend, fullgraph=True, **self.options)

    @property
    def graphs(self) -> int:
        return self.backend.frame_count


def policy(**config: Any) -> Any:
    net = TensorDictModule(lambda x: (x, x.exp()), ["obs"], ["loc", "scale"])
    safe = head(
        fp.SafeProbabilisticModule,
        spec=Bounded(-1.0, 1.0, shape=(4,)),
        safe=True,
        return_log_prob=True,
        **config,
    )
    return fp.ProbabilisticTensorDictSequential(net, safe)


def obs_td(rows: int = 3) -> TensorDict:
    return TensorDict(obs=torch.randn(rows, 4), batch_size=[rows])


@pytest.mark.parametrize("make", [policy, head], ids=["safe sequence", "module"])
def test_one_graph_an_interaction_type(make):
    counted = Counted()
    module = counted(make())
    td = obs_td() if make is policy else normal_td(3)
    for _ in range(2):
        for i, kind in enumerate(TYPES):
            with fp.set_interaction_type(kind):
                module(td.copy())
            if _ == 0:
                assert counted.graphs == i + 1
    assert counted.graphs == len(TYPES)
    # Another epoch, another seed, training and evaluation.
    torch.manual_seed(5)
    module.eval()
    for kind in TYPES:
        with fp.set_interaction_type(kind):
            module(td.copy())
    module.train()
    assert counted.graphs == len(TYPES)


def test_one_graph_an_input_signature():
    counted = Counted(dynamic=False)
    module = counted(head(default_interaction_type="random"))
    for rows in (3, 4, 3, 4):
        module(normal_td(rows))
    assert counted.graphs == 2
    module(normal_td(3, dtype=torch.float64))
    assert counted.graphs == 3


@pytest.mark.parametrize("name", ["IndependentNormal", "TanhNormal", "Categorical", "Beta"])
def test_a_dynamic_batch_compiles_once(name):
    """Up to 70,000 rows: draws that large are made in pieces in eager mode."""
    params = {
        "Categorical": ["logits"],
        "Beta": ["concentration1", "concentration0"],
    }.get(name, ["loc", "scale"])
    counted = Counted()
    module = head(
        in_keys=params,
        distribution_class=name,
        default_interaction_type="random",
        return_log_prob=True,
    )

    def run(inputs):
        batch = next(iter(inputs.values())).shape[:1]
        return module(TensorDict(inputs, batch_size=batch))["action"]

    compiled = counted(run)
    with torch.no_grad():
        for rows in (3, 8, 70_000):
            inputs = {k: torch.rand(rows, 8) + 0.5 for k in params}
            for value in inputs.values():
                torch._dynamo.mark_dynamic(value, 0)
            results = []
            for call in (compiled, run):
                torch.manual_seed(rows)
                results.append(call(inputs))
            torch.testing.assert_close(*results)
    assert counted.graphs == 1


def test_a_batch_size_that_changes_compiles_twice():
    """A tensordict's batch size is plain ints, which dynamo takes for constants the first time."""
    counted = Counted()
    module = counted(head(default_interaction_type="random"))
    for rows in (3, 8, 5, 70_000):
        module(normal_td(rows))
    assert counted.graphs == 2


def test_the_seed_of_a_generator_is_no_constant():
    counted = Counted()
    for how in (1, 2, torch.Generator().manual_seed(3)):
        module = counted(head(generator=how, default_interaction_type="random"))
        for _ in range(2):
            module(normal_td(3))
    assert counted.graphs == 1
    module = counted(head(generator="rng", default_interaction_type="random"))
    td = TensorDict(normal_td(3).to_dict())
    for seed in (1, 2):
        td["rng"] = torch.tensor(seed)
        module(td.copy())
        module(module(td.copy()))
    # The first input has no action yet.
    assert counted.graphs <= 3


def test_a_new_module_of_the_same_configuration_is_not_compiled_anew():
    counted = Counted()
    for _ in range(3):
        module = counted(head(return_log_prob=True, default_interaction_type="random"))
        module(normal_td(3))
    assert counted.graphs == 1


def test_the_keyword_compiles_once_a_type():
    counted = Counted()
    module = counted(head())
    for _ in range(2):
        for kind in ("random", "mode", fp.InteractionType.RANDOM):
            module(normal_td(3), interaction_type=kind)
    # "random" and its enumeration are two constants to the compiler.
    assert counted.graphs == 3
