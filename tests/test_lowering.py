"""Draws in graphs that Inductor compiles: ATen's own calls, in eager mode's order and numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import distributions as D
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import fastprob as fp
from fastprob import distributions, rng, streams
from fastprob.ops import projection
from fastprob.specs import Bounded

DRAWS = {
    "normal_": lambda shape, like: rng.standard_normal(shape, like),
    "exponential_": lambda shape, like: rng.exponential(shape, like, None),
    "uniform_": lambda shape, like: rng.uniform(shape, like, None, -2.0, 0.5),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    # Code from an earlier run would not show what is generated now.
    with config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def both(function, *args):
    """What eager mode and Inductor make of a call from the same seed, and the generated code."""
    torch.manual_seed(5)
    expected = function(*args)
    end = torch.get_rng_state()
    compiled = torch.compile(function, fullgraph=True)
    torch.manual_seed(5)
    found, code = run_and_get_code(compiled, *args)
    assert torch.equal(torch.get_rng_state(), end)
    return expected, found, code


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draw_is_one_aten_call(name, dtype):
    like = torch.ones(5, 4, dtype=dtype)
    expected, found, code = both(lambda x: DRAWS[name](x.shape, x) * 2 + x, like)
    assert torch.equal(found, expected)
    assert any(f".{name}(" in text for text in code)
    assert not any("torch.ops.fastprob" in text for text in code)


def test_shape_of_a_draw_may_be_dynamic_empty_or_none():
    def function(x):
        return rng.standard_normal((3, *x.shape), x), rng.standard_normal(torch.Size(()), x)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (7, 3, 0):
        x = torch.zeros(rows, 4)
        torch.manual_seed(rows)
        expected = function(x)
        torch.manual_seed(rows)
        assert all(map(torch.equal, compiled(x), expected))


def test_equal_draws_are_drawn_apart_and_in_order():
    def function(x):
        third = rng.standard_normal(x.shape, x)
        first, _unused, second = (rng.standard_normal(x.shape, x) for _ in range(3))
        return second.exp().sum(), first + 1.0, third

    expected, found, _ = both(function, torch.zeros(4, 4))
    assert all(map(torch.allclose, found, expected))
    assert not torch.equal(found[1] - 1.0, found[2])


def test_draws_of_a_graph_with_gradients_are_as_in_eager_mode():
    x = torch.ones(6, 3, requires_grad=True)
    expected, found, code = both(lambda x: (x * rng.standard_normal(x.shape, x)).sin().sum(), x)
    (gradient,) = torch.autograd.grad(expected, x)
    assert torch.allclose(torch.autograd.grad(found, x)[0], gradient)
    assert any(".normal_()" in text for text in code)


def test_draw_from_a_generator_stays_an_operator():
    stream = streams.Stream.read(3)
    like = torch.zeros(4, 2)
    function = torch.compile(lambda x: rng.standard_normal(x.shape, x, stream), fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(function(like), torch.randn(4, 2, generator=generator))
    assert torch.equal(function(like), torch.randn(4, 2, generator=generator))


def test_large_exponential_draw_takes_the_faster_way():
    expected, found, code = both(
        lambda x: rng.exponential(x.shape, x, None) + x, torch.ones(64, 64)
    )
    assert torch.equal(found, expected)
    assert any("fastprob.reference._noise.exponential_(" in text for text in code)


# categoricals -------------------------------------------------------------------------------


def categorical(name, rows, from_probs=False, width=8):
    draw = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, width, generator=draw)
    if name.startswith("Masked"):
        mask = torch.rand(rows, width, generator=draw) < 0.6
        mask[:, 1] = True
        return lambda x: getattr(distributions, name)(logits=x, mask=mask), logits
    if "Ordinal" in name:
        return lambda x: getattr(distributions, name)(scores=x), logits
    if from_probs:
        return lambda x: getattr(distributions, name)(probs=x), logits.exp()
    return lambda x: getattr(distributions, name)(logits=x), logits


CATEGORICALS = [
    ("Categorical", False), ("Categorical", True), ("OneHotCategorical", False),
    ("MaskedCategorical", False), ("MaskedOneHotCategorical", False), ("Ordinal", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "from_probs"), CATEGORICALS)
@pytest.mark.parametrize("rows", [16, 4096])
def test_categorical_draws_without_gradients(name, from_probs, rows):
    make, given = categorical(name, rows, from_probs)
    expected, found, code = both(lambda x: make(x).sample_and_log_prob(), given)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    assert any("= torch.ops.fastprob.categorical_race" in text for text in code) is (rows == 4096)


@pytest.mark.parametrize(("name", "from_probs"), CATEGORICALS)
@pytest.mark.parametrize("rows", [16, 2048])
def test_categorical_modes(name, from_probs, rows):
    make, given = categorical(name, rows, from_probs)
    # Of equals the first.
    given[3] = 1.0
    expected, found, code = both(lambda x: make(x).mode, given)
    assert torch.equal(found, expected)
    assert any("aten.max.dim" in text for text in code) is (rows == 2048)
    assert not any("= torch.ops.fastprob" in text for text in code)


# Rows that fill vectors, and few categories, whose largest is found without a loop.
@pytest.mark.parametrize(("width", "largest", "race"), [(4, False, True), (18, True, False),
                                                        (64, False, False)])  # fmt: skip
def test_the_number_of_categories_decides_what_is_taken(width, largest, race):
    make, given = categorical("Categorical", 10_000, width=width)
    given[3] = 1.0
    expected, found, code = both(lambda x: make(x).mode, given)
    assert torch.equal(found, expected)
    assert any("aten.max.dim" in text for text in code) is largest
    expected, found, code = both(lambda x: make(x).sample_and_log_prob(), given)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    assert any("= torch.ops.fastprob.categorical_race" in text for text in code) is race


def test_categorical_draws_with_gradients_are_scored_by_the_formula():
    make, given = categorical("Categorical", 4096)
    given.requires_grad_()
    expected, found, code = both(lambda x: make(x).sample_and_log_prob(), given)
    assert torch.equal(found[0], expected[0])
    grads = [torch.autograd.grad(score.sum(), given)[0] for score in (found[1], expected[1])]
    assert torch.allclose(*grads, atol=1e-6)
    assert not any("= torch.ops.fastprob.categorical_race" in text for text in code)


def test_categorical_draws_of_an_open_size_and_under_vmap():
    def function(x):
        return distributions.Categorical(logits=x).sample_and_log_prob()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (7, 4096):
        x = torch.randn(rows, 8)
        torch.manual_seed(rows)
        expected = function(x)
        torch.manual_seed(rows)
        found = compiled(x)
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1], atol=1e-6)
    x = torch.randn(3, 700, 8)
    modes = torch.compile(torch.vmap(lambda x: distributions.Categorical(logits=x).mode))
    assert torch.equal(modes(x), x.argmax(-1))


@pytest.mark.parametrize("name", ["largest", "categorical_race"])
def test_operators_pass_opcheck(name):
    x, noise = torch.randn(5, 4), torch.rand(5, 4) + 0.1
    op = getattr(torch.ops.fastprob, name).default
    torch.library.opcheck(op, (x,) if name == "largest" else (x, noise, False))
    batched = torch.vmap(op)(x[None]) if name == "largest" else (
        torch.vmap(op, in_dims=(0, None, None))(torch.stack([x, -x]), noise, False)[0])  # fmt: skip
    first = op(x) if name == "largest" else op(x, noise, False)[0]
    assert torch.equal(batched[0], first)


# points of continuous families --------------------------------------------------------------


def test_the_steps_to_a_tanh_normals_mode_are_not_run_again_by_the_backward_pass():
    draw = torch.Generator().manual_seed(2)
    # Far from where 1 - tanh^2 is all rounding.
    loc, scale = torch.rand(2, 40, 8, generator=draw)
    leaves = loc.requires_grad_(), scale.mul(0.4).add(0.1).requires_grad_()

    def function(loc, scale):
        return distributions.TanhNormal(loc, scale).mode

    expected, found, _ = both(function, *leaves)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn(40, 8, generator=draw)
    for f, e in zip(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(f, e, rtol=1e-4, atol=1e-5)
    forward, backward = run_and_get_code(
        lambda: torch.compile(function, fullgraph=True)(*leaves).sum().backward()
    )[1]
    assert forward.count(".tanh()") >= 3
    assert backward.count(".tanh()") <= 2
    assert "= torch.ops.fastprob" not in forward + backward


@pytest.mark.parametrize("rows", [16, 4096])
def test_gradients_of_transforms_in_a_graph_reach_a_categorical_draws_score(rows):
    def function(x):
        return torch.func.grad(
            lambda x: distributions.Categorical(logits=x).sample_and_log_prob()[1].sum()
        )(x)

    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    found = torch.compile(function, fullgraph=True)(x)
    # Of the index that won: one less its probability, less those of the others.
    one_hot = (found > 0).double()
    assert (one_hot.sum(-1) == 1).all()
    assert torch.allclose(found.double(), one_hot - x.double().softmax(-1), atol=1e-5)


def policy_call(grad):
    """A module, its parameters, and the operators of a graph that its compiled call is."""
    module = fp.ProbabilisticTensorDictModule(
        ["loc", "scale"],
        ["action"],
        distribution_class=distributions.IndependentNormal,
        default_interaction_type="random",
        return_log_prob=True,
    )
    loc = torch.zeros(5, 3, requires_grad=grad)
    return module, TensorDict(loc=loc, scale=torch.ones(5, 3), batch_size=[5])


def operators(function, *args):
    """The targets of the graph's calls, as dynamo hands it over."""
    found = []

    def backend(graph, inputs):
        found.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found


ALONE = torch.ops.fastprob.standard_normal.alone
ORDERED = torch.ops.fastprob.standard_normal.default


@pytest.fixture
def unchecked():
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(False)
    yield
    D.Distribution.set_default_validate_args(before)


def test_only_a_graph_that_is_the_call_does_without_the_token(unchecked):
    module, td = policy_call(False)
    found = operators(module, td.copy())
    assert ALONE in found and ORDERED not in found
    for function in (
        lambda td: module(td),
        TensorDictSequential(module),
        type("Heir", (type(module),), {"forward": lambda self, td: module(td)})(["loc"]),
    ):
        torch._dynamo.reset()
        found = operators(function, td.copy())
        assert ORDERED in found and ALONE not in found

    # A module whose call makes a distribution of the draws of another.
    class Mixed(type(module)):
        def get_dist(self, tensordict):
            first, second = (module(tensordict.copy())["action"] for _ in range(2))
            return distributions.IndependentNormal(first - second, torch.ones(5, 3))

    mixed = Mixed(["loc", "scale"], ["action"], default_interaction_type="mode")
    torch._dynamo.reset()
    found = operators(mixed, td.copy())
    assert ORDERED in found and ALONE not in found
    torch._dynamo.reset()
    torch.manual_seed(0)
    expected = mixed(td.copy())["action"]
    torch.manual_seed(0)
    assert torch.allclose(torch.compile(mixed)(td.copy())["action"], expected)
    assert expected.abs().min() > 0
    # What follows a graph break is a graph of its own, with the call of the module in it.
    torch._dynamo.reset()

    def broken(td):
        torch._dynamo.graph_break()
        first = module(td.copy())
        return first, module(td.copy())

    torch.manual_seed(0)
    expected = broken(td)
    torch.manual_seed(0)
    for one, other in zip(torch.compile(broken)(td), expected, strict=True):
        assert torch.equal(one["action"], other["action"])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_draw_of_a_whole_graph_is_eager_modes(unchecked, backend, grad):
    module, td = policy_call(grad)
    call = torch.compile(module, backend=backend, fullgraph=True)
    results = []
    for each in (module, call):
        torch.manual_seed(7)
        results.append([each(td.copy()) for _ in range(3)] + [torch.randn(2)])
    *expected, after = results[0]
    *found, state = results[1]
    assert torch.equal(after, state)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["action"], other["action"])
        assert torch.allclose(one["sample_log_prob"], other["sample_log_prob"])
        assert one["action"].requires_grad is grad
    assert not torch.equal(found[0]["action"], found[1]["action"])


def test_the_token_is_read_by_several_draws_alone():
    def function(x):
        return rng.standard_normal(x.shape, x)

    like = torch.ones(5, 4)
    *_, one = both(function, like)
    *_, two = both(lambda x: function(x) + function(x), like)
    assert not any("del arg1_1" in text for text in one)
    assert any(".normal_()" in text for text in one)
    assert any("del arg1_1" in text for text in two)


SPECIAL = [-float("inf"), -2.0, -1.0, -0.0, 0.25, 0.5, 3.0, float("inf"), float("nan")]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_clamp_with_a_gradient_keeps_no_mask(dtype, layout):
    project = projection.Clamp(-1.0, 0.5, dtype)
    values = torch.tensor(SPECIAL * 4, dtype=dtype).view(9, 4)
    values = values if layout == "rows" else values.T.contiguous().T
    x = values.requires_grad_()
    weights = torch.linspace(1.0, 2.0, 36).view(9, 4).to(dtype)
    expected, found, code = both(lambda x: project(x * 1.0), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()
    (gradient,) = torch.autograd.grad(expected, x, weights)
    assert gradient.any() and not gradient.all()
    *_, backward = run_and_get_code(torch.autograd.grad, found, x, weights)
    (made,) = torch.autograd.grad(torch.compile(lambda x: project(x * 1.0))(x), x, weights)
    torch.testing.assert_close(made, gradient, rtol=0, atol=0)
    # Of another layout than the operator's result, it is left to Inductor.
    assert any("bool*" in text for text in [*code, *backward]) is (layout == "columns")


@pytest.mark.parametrize("family", ["IndependentNormal", "TanhNormal"])
def test_a_safe_module_passes_gradients_as_in_eager_mode(unchecked, family):
    config = {
        "distribution_class": getattr(distributions, family),
        "default_interaction_type": "random",
        "return_log_prob": True,
        "spec": Bounded(-0.5, 0.5, shape=(3,)),
        "safe": True,
    }
    module = fp.SafeProbabilisticModule(["loc", "scale"], ["action"], **config)
    loc = torch.linspace(-1.0, 1.0, 15).view(5, 3).requires_grad_()
    td = TensorDict(loc=loc, scale=torch.full((5, 3), 0.5), batch_size=[5])
    gradients = []
    for call in (module, torch.compile(module, fullgraph=True)):
        torch.manual_seed(3)
        out = call(td.copy())
        total = out["action"].square().sum() + out["sample_log_prob"].sum()
        gradients.append(torch.autograd.grad(total, loc)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_transforms_of_a_clamp_are_those_of_eager_mode():
    project = projection.Clamp(-1.0, 0.5, torch.float32)
    x = torch.tensor(SPECIAL[1:-1]).view(7, 1).requires_grad_()

    def of_rows(x):
        return torch.vmap(torch.func.grad(lambda row: project(row).square().sum()))(x)

    assert torch.equal(torch.compile(of_rows, fullgraph=True)(x), of_rows(x))
