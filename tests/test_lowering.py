"""Draws in graphs that Inductor compiles: ATen's own calls, in eager mode's order and numbers."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from fastprob import rng

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
    stream = rng.Stream.read(3)
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
