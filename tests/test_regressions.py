"""Faults that were found and fixed, each as the plainest call that showed it."""

from __future__ import annotations

import pytest
import torch
import torchrl.modules as rl
from tensordict import TensorDict
from torch import distributions as D

import fastprob
from fastprob import InteractionType
from fastprob import distributions as F
from tests._modules import head


@pytest.mark.parametrize("interaction", ["random", "mode"])
def test_a_draw_of_a_tanh_delta_carries_no_gradient_and_its_mode_does(interaction):
    found = []
    for cls, kind in (
        (rl.SafeProbabilisticModule, rl.TanhDelta),
        (fastprob.SafeProbabilisticModule, F.TanhDelta),
    ):
        td = TensorDict(param=torch.randn(2, 3, requires_grad=True), batch_size=[2])
        module = head(
            cls,
            in_keys=["param"],
            distribution_class=kind,
            default_interaction_type=InteractionType(interaction),
        )
        found.append(module(td)["action"].requires_grad)
    assert found == [interaction == "mode"] * 2


@pytest.mark.parametrize("kind", [F.TanhNormal, F.TruncatedNormal])
@pytest.mark.parametrize("interaction", ["random", "deterministic"])
def test_bounds_in_tensors_break_no_graph(kind, interaction):
    # As a policy has them that takes its bounds from the environment's spec.
    module = fastprob.SafeProbabilisticModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=kind,
        distribution_kwargs={"low": torch.tensor([-2.0, -1.0]), "high": torch.tensor([1.0, 3.0])},
        default_interaction_type=InteractionType(interaction),
        return_log_prob=True,
    )
    td = TensorDict(loc=torch.zeros(4, 2), scale=torch.full((4, 2), 0.5), batch_size=[4])
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = module(td.copy())
        torch.manual_seed(0)
        found = compiled(td.copy())
    for key in ("action", "sample_log_prob"):
        torch.testing.assert_close(found[key], expected[key])


def test_a_composite_of_a_tensor_says_what_it_expects():
    with pytest.raises(TypeError, match=r"expects params to be a tensordict .* got Tensor"):
        F.CompositeDistribution(torch.zeros(3), {"a": D.Normal})


def test_mode_of_a_beta_on_the_border_has_a_gradient_in_a_graph():
    def function(a, b):
        return F.Beta(a, b).take(InteractionType.MODE, score=True)

    a = torch.tensor([1.3, 2.0], requires_grad=True)
    b = torch.tensor([0.5, 3.0], requires_grad=True)
    gradients = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        value, _ = call(a, b)
        assert value[0] == 1.0
        gradients.append(torch.autograd.grad(value.sum(), (a, b)))
    assert all(map(torch.equal, *gradients))
    assert all(g.isfinite().all() for g in gradients[0])
