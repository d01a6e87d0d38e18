"""MaskedCategorical and MaskedOneHotCategorical against sums over the allowed actions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchrl.modules as rl
from torch import distributions as D

from fastprob import distributions as F
from tests.distributions import test_categorical as base

K = base.K
INF = float("inf")
MASK = torch.tensor([True, False, True, True, False])
LISTED = torch.tensor([3, 0, 2])
PADDED = torch.tensor([-1, 3, 0, -1, 2])
PAIRS = [(F.MaskedCategorical, rl.MaskedCategorical)]
PAIRS += [(F.MaskedOneHotCategorical, rl.MaskedOneHotCategorical)]
FORMS = ["mask", "indices", "padded"]


def form(name: str, batch: tuple[int, ...]) -> dict:
    """The same three allowed actions in each of TorchRL's forms."""
    if name == "mask":
        return {"mask": MASK.expand(*batch, K)}
    if name == "indices":
        return {"indices": LISTED.expand(*batch, 3)}
    return {"indices": PADDED.expand(*batch, 5), "padding_value": -1}


class MaskMixin:
    name = "mask"

    def masked(self, params):
        return form(self.name, next(iter(params.values())).shape[:-1])

    def build(self, params):
        return self.pair[0](**params, **self.masked(params))

    def upstream(self, params):
        # Upstream draws from a list in batches of one dimension only.
        return self.pair[1](**params, **form("mask", next(iter(params.values())).shape[:-1]))

    def probs(self, params):
        probs = super().probs(params) * MASK.numpy()
        return probs / probs.sum(-1, keepdims=True)

    def log_prob(self, params, value):
        with np.errstate(divide="ignore"):
            return super().log_prob(params, value)

    # Upstream's own draws: the test below.
    test_draws_follow_the_probabilities = None

    def test_kl_divergence(self):
        p, q = self.leaves((3,)), self.leaves((3,))
        found = D.kl_divergence(self.build(p), self.build(q))
        a, b = (self.probs(self.arrays(d))[..., MASK.numpy()] for d in (p, q))
        base_close(found, (a * np.log(a / b)).sum(-1))
        grads = torch.autograd.grad(found.sum(), [*p.values(), *q.values()])
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        plain = D.Categorical(**q)
        base_close(D.kl_divergence(self.build(p), plain), self.against(p, plain))
        assert (D.kl_divergence(plain, self.build(p)) == INF).all()

    def against(self, p, plain):
        a, b = self.probs(self.arrays(p)), plain.probs.detach().numpy()
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(-1)

    def test_logits_and_probs_are_normalized(self):
        dist = self.build(self.params((2, 3)))
        torch.testing.assert_close(dist.probs.sum(-1), torch.ones(2, 3, dtype=torch.float64))
        torch.testing.assert_close(dist.logits.exp(), dist.probs)


def base_close(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


class TestMask(MaskMixin, base.TestCategoricalLogits):
    pair = PAIRS[0]


class TestMaskProbs(MaskMixin, base.TestCategoricalProbs):
    pair = PAIRS[0]


class TestPadded(TestMask):
    name = "padded"


class TestIndicesProbs(TestMaskProbs):
    name = "indices"


class TestOneHotMask(MaskMixin, base.TestOneHotLogits):
    pair = PAIRS[1]


class TestOneHotIndices(TestOneHotMask):
    name = "indices"

    # The probabilities are those of the list; the surrogate's are spread over the actions.
    test_rsample_hands_the_gradient_to_the_probabilities = None


@pytest.mark.parametrize("sample", [(), (1,), (7,)], ids=str)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("key", ["logits", "probs"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
def test_draws_and_modes_are_upstreams(pair, key, name, sample):
    if key == "probs" and name == "padded":
        return  # upstream gathers at the padding and raises
    params = {key: torch.rand(16, K)}
    mine, theirs = (cls(**params, **form(name, (16,))) for cls in pair)
    torch.manual_seed(5)
    drawn = mine.sample(sample)
    torch.manual_seed(5)
    assert torch.equal(drawn, theirs.sample(sample))
    assert torch.equal(mine.mode, theirs.mode)
    torch.testing.assert_close(mine.log_prob(mine.mode), theirs.log_prob(theirs.mode))
    actions = drawn if pair[0] is F.MaskedCategorical else drawn.argmax(-1)
    assert MASK[actions].all()


@pytest.mark.parametrize("neg_inf", [-INF, -1e5])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
def test_masked_actions_score_neg_inf_and_hand_back_no_gradient(pair, name, neg_inf):
    logits = torch.randn(2, K, requires_grad=True)
    dist = pair[0](logits=logits, **form(name, (2,)), neg_inf=neg_inf)
    value = torch.arange(K).view(K, 1).expand(K, 2)
    if pair[0] is F.MaskedOneHotCategorical:
        value = torch.nn.functional.one_hot(value, K)
    score = dist.log_prob(value)
    assert (score[~MASK] == neg_inf).all()
    torch.testing.assert_close(score[MASK].exp().sum(0), torch.ones(2))
    (grad,) = torch.autograd.grad(score[~MASK].sum(), logits, retain_graph=True)
    assert torch.equal(grad, torch.zeros(2, K))
    (grad,) = torch.autograd.grad(score[MASK].sum() + dist.entropy().sum(), logits)
    assert grad.isfinite().all() and (grad[:, ~MASK] == 0).all() and (grad[:, MASK] != 0).all()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
@pytest.mark.parametrize("key", ["logits", "probs"])
def test_all_but_one_masked(pair, key):
    params = torch.rand(3, K, requires_grad=True)
    mask = torch.eye(K, dtype=torch.bool)[:3]
    dist = pair[0](**{key: params}, mask=mask)
    assert torch.equal(dist.entropy(), torch.zeros(3))
    value, score = dist.sample_and_log_prob((4,))
    assert torch.equal(score, torch.zeros(4, 3))
    index = value if pair[0] is F.MaskedCategorical else value.argmax(-1)
    assert torch.equal(index, torch.arange(3).expand(4, 3))
    total = (
        dist.entropy().sum() + score.sum() + dist.rsample().sum()
        if index is not value
        else (dist.entropy().sum() + score.sum())
    )
    assert torch.autograd.grad(total, params)[0].isfinite().all()


def test_an_action_listed_twice_has_the_probability_of_both():
    logits = torch.zeros(1, 3, dtype=torch.float64)
    dist = F.MaskedCategorical(logits=logits, indices=torch.tensor([[2, 0, 2]]))
    scores = dist.log_prob(torch.arange(3).view(3, 1)).flatten()
    torch.testing.assert_close(scores.exp(), torch.tensor([1 / 3, 0, 2 / 3]).double())
    assert dist.median.item() == 2 and dist.mean.item() == pytest.approx(4 / 3)
    torch.manual_seed(0)
    value, joint = dist.sample_and_log_prob()
    torch.testing.assert_close(joint, dist.log_prob(value))


def test_medians_of_a_list_are_in_the_order_of_the_actions():
    logits = torch.tensor([[0.1, 5.0, 0.2, 0.3, -4.0]], dtype=torch.float64)
    by_list = F.MaskedCategorical(logits=logits, indices=LISTED[None])
    by_mask = F.MaskedCategorical(logits=logits, mask=MASK[None])
    assert by_list.median.item() == by_mask.median.item() == 2
    torch.testing.assert_close(by_list.mean, by_mask.mean)


def test_relaxed_one_hot_draws():
    logits = torch.randn(50, K, requires_grad=True)
    for name in FORMS:
        dist = F.MaskedOneHotCategorical(
            logits=logits, **form(name, (50,)), grad_method="RelaxedOneHot"
        )
        value = dist.rsample()
        torch.testing.assert_close(value.sum(-1), torch.ones(50))
        assert (value[:, ~MASK] == 0).all()
        (grad,) = torch.autograd.grad((value * torch.randn(50, K)).sum(), logits)
        assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("cls", [p[0] for p in PAIRS])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "either mask.*neither"),
        ({"mask": MASK, "indices": LISTED}, "either mask.*both"),
        ({"mask": MASK, "probs": torch.ones(K)}, "either logits or probs.*both"),
        ({"mask": LISTED}, "mask to be a boolean tensor.*int64"),
        ({"mask": MASK[:3]}, "mask over the 5 categories.*(3,)"),
        ({"indices": MASK}, "indices of an integer dtype.*pass a boolean tensor as mask"),
        ({"indices": torch.tensor([0, 5])}, r"between 0 and 4.*is 5 at index \(1,\)"),
        ({"indices": PADDED}, r"is -1 at index \(0,\).*padding_value"),
        ({"indices": torch.tensor([-1, -1]), "padding_value": -1}, "at least one allowed action"),
        ({"mask": torch.zeros(K, dtype=torch.bool)}, "at least one allowed action"),
        ({"mask": torch.tensor([[True] * K, [False] * K])}, r"1 of 2 rows.*\(1,\)"),
        ({"mask": MASK, "logits": torch.full((K,), math.nan)}, r"logits.*NaN.*index \(0,\)"),
        ({"mask": MASK, "logits": torch.tensor(0.0)}, "scalar"),
    ],
)
def test_bad_parameters(cls, params, message):
    given = {"validate_args": True, **params}
    if "logits" not in given:
        given["logits"] = torch.zeros(K)
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{message}"):
        cls(**given)


def test_a_value_of_another_number_of_categories():
    dist = F.MaskedOneHotCategorical(logits=torch.zeros(K), mask=MASK)
    with pytest.raises(ValueError, match="5 categories"):
        dist.log_prob(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="has no boolean mask"):
        F.MaskedCategorical(logits=torch.zeros(K), indices=LISTED).mask  # noqa: B018
    with pytest.raises(ValueError, match="grad_method"):
        F.MaskedOneHotCategorical(logits=torch.zeros(K), mask=MASK, grad_method="none")
