"""The backend that compiles equal graphs once: what it takes for equal, and what not."""

from __future__ import annotations

import pytest
import torch

from bench.remembering import Remembering


def compiled(function, backend):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def rows(*shape, **kwargs):
    return torch.linspace(0.5, 2, torch.Size(shape).numel()).view(shape).to(**kwargs)


def test_an_equal_graph_of_another_function_is_taken_from_before():
    def first(x, scale):
        return {"value": (x * scale).sigmoid()}

    def second(others):
        factor, y = others
        product = torch.mul(y, factor)
        return [product.sigmoid()]

    backend = Remembering("aot_eager")
    for call in (
        lambda x, s: compiled(first, backend)(x, s)["value"],
        lambda x, s: compiled(second, backend)((s, x))[0],
    ):
        x, scale = rows(3, 2).requires_grad_(), rows(2).requires_grad_()
        found = call(x, scale)
        found.sum().backward()
        torch.testing.assert_close(found, (x * scale).sigmoid())
        slope = (x * scale).sigmoid() * (1 - (x * scale).sigmoid())
        torch.testing.assert_close(x.grad, (slope * scale).detach())
        torch.testing.assert_close(scale.grad, (slope * x).sum(0).detach())
    # `torch.mul` and `*` are two operators to dynamo, and their inputs come in another order.
    assert (backend.compiled, backend.remembered) == (2, 0)
    torch.testing.assert_close(compiled(lambda a, b: (a * b).sigmoid(), backend)(x, scale), found)
    assert (backend.compiled, backend.remembered) == (2, 1)


X = rows(4, 4)
DIFFERENT = {
    "operator": (lambda x: x.sin(), [X], lambda x: x.cos(), [X]),
    "constant": (lambda x: x + 1, [X], lambda x: x + 2, [X]),
    "type of a constant": (lambda x: x + 1, [X.long()], lambda x: x + 1.0, [X.long()]),
    "sign of zero": (lambda x: x * 0.0, [X], lambda x: x * -0.0, [X]),
    "keyword": (lambda x: x.sum(dim=0), [X], lambda x: x.sum(dim=1), [X]),
    "order": (lambda x, y: (x - y, x * y), [X, X + 1], lambda x, y: (y - x, x * y), [X, X + 1]),
    "output": (lambda x: (x.sin(), x + 1)[:1], [X], lambda x: (x.sin(), x + 1)[::-1], [X]),
    "shape": (lambda x: x.mean(), [X], lambda x: x.mean(), [rows(5, 4)]),
    "strides": (lambda x: x.view(x.shape), [X], lambda x: x.view(x.shape), [X.t()]),
    "dtype": (lambda x: x.exp(), [X], lambda x: x.exp(), [X.double()]),
    "gradient": (lambda x: x.exp(), [X], lambda x: x.exp(), [X.clone().requires_grad_()]),
    "alias": (
        lambda x, y: x.add_(1) * y,
        [rows(4)[:3], rows(4)[:3]],
        lambda x, y: x.add_(1) * y,
        lambda: (lambda base: [base[:3], base[:3]])(rows(4)),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_graph_that_differs_is_compiled(what):
    backend = Remembering("aot_eager")
    first, inputs, second, others = DIFFERENT[what]
    compiled(first, backend)(*inputs)
    found, expected = (
        function(*(others() if callable(others) else others))
        for function in (compiled(second, backend), second)
    )
    assert backend.remembered == 0
    torch.testing.assert_close(found, expected)
    signs = (torch.signbit(x) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    torch.testing.assert_close(*signs)
    if what == "gradient":
        assert found.requires_grad


def test_a_graph_with_a_part_of_its_own_is_compiled_each_time():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    backend = Remembering("aot_eager")
    for _ in range(2):
        x = rows(3).requires_grad_()
        compiled(Twice.apply, backend)(x).sum().backward()
        assert x.grad.tolist() == [3.0, 3.0, 3.0]
    assert (backend.compiled, backend.remembered) == (2, 0)


def test_the_graphs_used_last_are_kept():
    backend = Remembering("aot_eager", most=2)
    for power in (1.5, 2.5, 1.5, 3.5, 1.5, 2.5):
        found = compiled(lambda x, power=power: x**power, backend)(X)
        torch.testing.assert_close(found, X**power)
    # 2.5 was used longest ago when 3.5 came.
    assert (backend.compiled, backend.remembered) == (4, 2)
