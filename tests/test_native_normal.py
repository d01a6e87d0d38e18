"""A Normal's score in compiled code on a CPU: the kernel in C++, and where it is used."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from fastprob import ProbabilisticTensorDictModule, native_normal
from fastprob.distributions import IndependentNormal

CALL = "fastprob.native_normal.kernel("
ROWS = 1040


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    # Code from an earlier run would not show what is generated now.
    with config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def parameters(*shape, seed=1):
    draw = torch.Generator().manual_seed(seed)
    loc, value = torch.randn(2, *shape, generator=draw)
    return loc, torch.empty(shape).log_normal_(generator=draw), value


def distribution(loc, scale, ndims=1):
    return IndependentNormal(loc, scale, event_dim=ndims, validate_args=False)


def by_module(loc, scale):
    module = ProbabilisticTensorDictModule(
        ["loc", "scale"], ["action"], distribution_class=IndependentNormal
    )
    return module.get_dist(TensorDict(loc=loc, scale=scale, batch_size=loc.shape[:1]))


def truth(loc, scale, value, g, e):
    """Score, entropy and the gradients of their weighted sum, in float64."""
    loc, scale, value, g, e = (x.double() for x in (loc, scale, value, g, e))
    z = (value - loc) / scale
    logs = scale.log().sum(-1)
    offset = 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    score, entropy = -0.5 * (z * z).sum(-1) - logs - offset, logs + offset + 0.5 * loc.shape[-1]
    g, e = g.unsqueeze(-1), e.unsqueeze(-1)
    return score, entropy, g * z / scale, (g * (z * z - 1) + e) / scale


# the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 16, 17, 31, 48, 63, 64])
@pytest.mark.parametrize("rows", [1, 33, 517])
def test_kernel_is_as_exact_as_torch(rows, width):
    assert native_normal.available()
    loc, scale, value = parameters(rows, width)
    g, e = torch.randn(2, rows, generator=torch.Generator().manual_seed(2))
    exact = truth(loc, scale, value, g, e)
    both = [torch.full((2, rows), torch.nan), torch.full((2, rows, width), torch.nan)]
    for out, what in zip(both, (0, 3), strict=True):
        native_normal.kernel(g, e, loc, scale, value, out, rows, width, what)
    found = [*both[0], *both[1]]
    own = [torch.empty(2, rows), torch.empty(2, rows, width)]
    for out, what in zip(own, (0, 3), strict=True):
        native_normal.by_formula(g, e, loc, scale, value, out, rows, width, what)
    theirs = [*own[0], *own[1]]
    for f, t, x in zip(found, theirs, exact, strict=True):
        size = x.abs().max()
        assert (f - x).abs().max() <= 2 * (t - x).abs().max() + 2e-7 * size
    # A gradient of one of the two alone.
    for what, g_, e_ in ((1, g, 0 * e), (2, 0 * g, e)):
        out = torch.full((2, rows, width), torch.nan)
        native_normal.kernel(g, e, loc, scale, value, out, rows, width, what)
        for f, x in zip(out, truth(loc, scale, value, g_, e_)[2:], strict=True):
            torch.testing.assert_close(f.double(), x, rtol=1e-5, atol=1e-5)


def test_kernel_at_scales_of_any_size():
    loc, _, value = parameters(300, 8)
    for exponent in (-120, -38, -30, -15, 0, 15, 30, 38, 120):
        scale = torch.full((300, 8), 2.0**exponent)
        # One element far from the others, in one row.
        scale[150, 3] = 3.0
        out = torch.full((2, 300), torch.nan)
        native_normal.kernel(loc, loc, loc, scale, value, out, 300, 8, 0)
        logs = scale.double().log().sum(-1)
        entropy = logs + 4 * math.log(2 * math.pi) + 4
        torch.testing.assert_close(out[1].double(), entropy, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("strange", [0.0, -0.0, -1.0, math.inf, math.nan])
def test_a_strange_scale_spoils_its_row_alone(strange):
    loc, scale, value = parameters(300, 8)
    scale[150, 3] = strange
    out = torch.empty(2, 300)
    native_normal.kernel(loc, loc, loc, scale, value, out, 300, 8, 0)
    dist = torch.distributions.Normal(loc, scale, validate_args=False)
    expected = torch.stack([dist.log_prob(value).sum(-1), dist.entropy().sum(-1)])
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out.isfinite().sum(-1).tolist() == [299, 299]


# in graphs ----------------------------------------------------------------------------------


def both_passes(make, loc, scale, value, score=True, entropy=True):
    """What a compiled function gives, its gradients, and the code of its two passes."""
    leaves = [x.clone().requires_grad_() for x in (loc, scale, value)]
    weights = torch.linspace(-1.0, 2.0, loc.shape[0])

    def function(loc, scale, value):
        dist = make(loc, scale)
        results = []
        if score:
            results.append(dist.log_prob(value))
        if entropy:
            results.append(dist.entropy())
        shaped = weights.reshape(-1, *(1,) * (results[0].dim() - 1))
        return results, sum((r * shaped * k).sum() for k, r in enumerate(results, 1))

    def run(call):
        results, loss = call(*leaves)
        return [r.detach() for r in results], torch.autograd.grad(loss, leaves, allow_unused=True)

    expected = run(function)
    exact = run(lambda *x: function(*(t.double() for t in x)))
    found, code = run_and_get_code(lambda: run(torch.compile(function, fullgraph=True)))
    for f, e, x in zip((*found[0], *found[1]), (*expected[0], *expected[1]), (*exact[0], *exact[1]),
                       strict=True):  # fmt: skip
        if e is None:
            assert f is None or not f.any()
            continue
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(f.double(), x.double(), rtol=2e-5, atol=2e-5)
    return "".join(code)


@pytest.mark.parametrize("make", [distribution, by_module])
@pytest.mark.parametrize("rows", [16, ROWS])
def test_score_and_entropy_in_both_passes(make, rows):
    code = both_passes(make, *parameters(rows, 8))
    assert (CALL in code) is (rows * 8 >= native_normal.LEAST)
    assert "torch.ops.fastprob" not in code
    if rows == ROWS:
        # One pass gives score and entropy, one their gradients.
        assert code.count(CALL) == 2


@pytest.mark.parametrize("rows", [16, ROWS])
def test_score_alone_and_entropy_alone(rows):
    assert (CALL in both_passes(by_module, *parameters(rows, 8), entropy=False)) is (rows == ROWS)
    assert CALL not in both_passes(by_module, *parameters(rows, 8), score=False)


def test_parameters_need_not_be_contiguous():
    loc, scale, value = parameters(8, ROWS)
    wide = torch.randn(ROWS, 16)
    assert CALL in both_passes(distribution, loc.T, scale.T, value.T)
    assert CALL in both_passes(
        distribution, wide.chunk(2, -1)[1], wide.exp().chunk(2, -1)[0], loc.T
    )


def test_several_batch_and_event_dimensions():
    loc, scale, value = parameters(100, 16, 2, 3)
    assert CALL in both_passes(lambda a, b: distribution(a, b, 2), loc, scale, value)
    assert CALL in both_passes(distribution, loc, scale, value)


def test_wide_events_and_other_dtypes_stay_with_inductor():
    assert CALL not in both_passes(distribution, *parameters(200, 65))
    compiled = torch.compile(lambda *x: distribution(*x[:2]).log_prob(x[2]), fullgraph=True)
    loc, scale, value = (x.double() for x in parameters(ROWS, 8))
    found, code = run_and_get_code(compiled, loc, scale, value)
    torch.testing.assert_close(found, distribution(loc, scale).log_prob(value))
    assert CALL not in "".join(code)


def test_values_of_more_dimensions_than_the_parameters():
    loc, scale, _ = parameters(ROWS, 8)
    value = torch.randn(3, ROWS, 8)
    compiled = torch.compile(lambda v: distribution(loc, scale).log_prob(v), fullgraph=True)
    torch.testing.assert_close(compiled(value), distribution(loc, scale).log_prob(value))


def test_a_batch_size_left_open_compiles_once():
    frames = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def function(loc, scale, value):
        dist = by_module(loc, scale)
        return dist.log_prob(value).sum() + dist.entropy().sum()

    compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=True)
    for rows in (ROWS, 16, 1000, 3):
        tensors = [x.requires_grad_() for x in parameters(rows, 8)]
        found = torch.autograd.grad(compiled(*tensors), tensors)
        expected = torch.autograd.grad(function(*tensors), tensors)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)
    assert frames.frame_count == 1


def test_two_distributions_of_a_graph_keep_apart():
    first, second = parameters(ROWS, 8), parameters(ROWS, 8, seed=2)

    def function(a, b):
        one, other = by_module(a, b), by_module(b, a.exp())
        return one.log_prob(second[0]), other.log_prob(first[2]), other.entropy(), one.entropy()

    tensors = [x.requires_grad_() for x in first[:2]]
    for found, expected in zip(
        torch.compile(function, fullgraph=True)(*tensors), function(*tensors), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_entropy_with_gradients_after_a_score_without():
    loc, scale, value = parameters(ROWS, 8)
    scale.requires_grad_()

    def function(scale):
        dist = by_module(loc, scale)
        with torch.no_grad():
            score = dist.log_prob(value)
        return dist.entropy().sum() + score.sum()

    (found,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(scale), scale)
    torch.testing.assert_close(found, 1 / scale.detach())


def test_a_distribution_from_outside_keeps_nothing_of_a_graph():
    loc, scale, value = parameters(ROWS, 8)
    dist = distribution(loc.requires_grad_(), scale.requires_grad_())
    before = dict(dist.__dict__)

    def function(value):
        return dist.log_prob(value).sum() + dist.entropy().sum()

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(value), function(value))
    kept = {k: v for k, v in dist.__dict__.items() if k != "_shared"}
    assert kept.keys() == before.keys()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_compilers_run_the_operator(backend):
    tensors = [x.requires_grad_() for x in parameters(ROWS, 8)]

    def function(loc, scale, value):
        dist = by_module(loc, scale)
        return dist.log_prob(value).sum() + dist.entropy().sum()

    found = torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    for f, e in zip(
        torch.autograd.grad(found, tensors), torch.autograd.grad(function(*tensors), tensors),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)


# torch loads what forward mode needs by a deprecated function of its own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_in_a_graph_see_the_formula():
    loc, scale, value = parameters(ROWS, 8)

    def score(loc, scale):
        return distribution(loc, scale).log_prob(value)

    def once(scale):
        return torch.func.grad(lambda loc: score(loc, scale).exp().sum())(loc)

    def twice(scale):
        return (torch.func.grad(lambda scale: once(scale).sum())(scale),)

    def forward(scale):
        return torch.func.jvp(lambda loc: score(loc, scale), (loc,), (value,))

    for function in (twice, forward):
        found = torch.compile(function, fullgraph=True)(scale)
        for f, e in zip(found, function(scale), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_operator_is_differentiable_twice():
    loc, scale, value = (x.double().requires_grad_() for x in parameters(3, 2))

    def score(loc, scale, value):
        return torch.ops.fastprob.normal_score(loc, scale, value, 1, False)[0]

    assert torch.autograd.gradgradcheck(score, (loc, scale, value))


# where it cannot be built -------------------------------------------------------------------


def test_without_a_compiler_graphs_hold_the_formula(monkeypatch):
    monkeypatch.setattr(native_normal, "_build", lambda: "no compiler")
    assert not native_normal.available()
    assert CALL not in both_passes(by_module, *parameters(ROWS, 8))


def test_code_of_another_process_builds_the_kernel_or_takes_the_formula(monkeypatch):
    loc, scale, value = parameters(ROWS, 8)
    expected = distribution(loc, scale).log_prob(value)
    for build in (native_normal._build, lambda: "no compiler"):
        monkeypatch.setattr(native_normal, "_build", build)
        monkeypatch.setattr(native_normal, "kernel", native_normal._first)
        out = torch.full((2, ROWS), torch.nan)
        native_normal.kernel(loc, loc, loc, scale, value, out, ROWS, 8, 0)
        torch.testing.assert_close(out[0], expected)
        assert native_normal.kernel is not native_normal._first


def test_a_kernel_that_computes_something_else_is_not_taken():
    def wrong(*args):
        native_normal.by_formula(*args)
        args[5][0, 0] += 1e-3

    assert native_normal._right(native_normal.by_formula)
    assert not native_normal._right(wrong)
