"""torch.func's gradients and tangents of a module call, eager and compiled, against autograd's."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from bench import cells
from bench.implementations import implementation

FAMILIES = (
    "Normal", "IndependentNormal", "TanhNormal", "TruncatedNormal", "Beta", "Delta", "TanhDelta",
    "Categorical", "Bernoulli",
)  # fmt: skip


class Loss:
    """A weighted sum of all that a module writes, as a function of its real parameters."""

    def __init__(self, family, interaction):
        cell = cells.Cell(family, interaction, True, "none", "none", "plain")
        self.call = cells.Call(cell, implementation("fastprob"))
        self.names = list(self.call.inputs)
        self.args = tuple(self.call.inputs.values())

    def __call__(self, *args):
        td = self.call.module(
            TensorDict(dict(zip(self.names, args, strict=True)), batch_size=[cells.ROWS])
        )
        total = 0.0
        for i, key in enumerate(self.call.written):
            value = td.get(key).float().reshape(-1)
            total = total + (value * torch.linspace(0.5, 1.5 + i, value.numel())).sum()
        return total

    def by_autograd(self):
        leaves = [arg.clone().requires_grad_() for arg in self.args]
        torch.manual_seed(1)
        loss = self(*leaves)
        if not loss.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.fixture(params=[f"{f} {i}" for f in FAMILIES for i in ("random", "mode")])
def loss(request):
    return Loss(*request.param.split())


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    def run(function, *args):
        if request.param == "compiled":
            torch._dynamo.reset()
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        return function(*args)

    return run


def test_grad_gives_autograds_gradients(loss, run):
    def gradients(*args):
        return torch.func.grad(loss, argnums=tuple(range(len(args))))(*args)

    torch.testing.assert_close(run(gradients, *loss.args), loss.by_autograd())


# The first use of torch's forward mode compiles its own decompositions so.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jvp_gives_the_tangent_that_follows_from_autograds_gradients(loss, run):
    def tangent(*args):
        return torch.func.jvp(loss, args, tuple(torch.ones_like(x) for x in args))[1]

    expected = sum(grad.sum() for grad in loss.by_autograd())
    # torch gives the tangent in float64 where a product with a constant is a part of it.
    found = run(tangent, *loss.args).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
