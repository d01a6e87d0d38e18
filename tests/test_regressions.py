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


def test_a_composite_of_a_tensor_says_what_it_expects():
    with pytest.raises(TypeError, match=r"expects params to be a tensordict .* got Tensor"):
        F.CompositeDistribution(torch.zeros(3), {"a": D.Normal})
