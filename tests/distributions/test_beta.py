"""Beta and Independent(Beta) against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torch import distributions as D

from fastprob import SafeProbabilisticModule
from fastprob import distributions as F
from fastprob.specs import Bounded
from tests.distributions._suite import Suite

GRID = torch.tensor([0.01, 0.05, 0.3, 0.5, 1.0, 1.5, 2.0, 10.0, 100.0, 1e4], dtype=torch.float64)


class TestBeta(Suite):
    event = ()

    def params(self, batch, dtype=torch.float64):
        shape = (*batch, *self.event)
        return {
            "concentration1": torch.rand(shape, dtype=dtype) * 3 + 0.5,
            "concentration0": torch.rand(shape, dtype=dtype) * 3 + 1.5,
        }

    def build(self, params):
        return F.Beta(**params)

    def upstream(self, params):
        return D.Beta(**params)

    def frozen(self, params):
        return scipy.stats.beta(params["concentration1"], params["concentration0"])

    def total(self, each):
        return each.sum(tuple(range(-len(self.event), 0))) if self.event else each

    def log_prob(self, params, value):
        return self.total(self.frozen(params).logpdf(value))

    def entropy(self, params):
        return self.total(self.frozen(params).entropy())

    def points(self, params):
        dist = self.frozen(params)
        up = np.maximum(params["concentration1"] - 1, 0)
        return {
            "mode": up / (up + params["concentration0"] - 1),
            "median": dist.median(),
            "mean": dist.mean(),
            "variance": dist.var(),
        }

    @pytest.mark.parametrize("sample", [(), (7,)], ids=str)
    def test_draws_and_their_gradients_are_upstreams(self, sample):
        results = []
        params = self.leaves((50,))
        for build in (self.build, self.upstream):
            torch.manual_seed(5)
            value = build(params).rsample(sample)
            grads = torch.autograd.grad(value.square().sum(), list(params.values()))
            results.append((value, *grads))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)

    # A draw by rejection jumps with the parameters: its derivative is the test above's.
    test_gradients_of_draws = None

    # ATen's sampler refuses randomness="same", and half precisions, as upstream.
    @pytest.mark.parametrize("randomness", ["different"])
    def test_vmap_of_draws(self, randomness):
        super().test_vmap_of_draws(randomness)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtypes_of_results(self, dtype):
        super().test_dtypes_of_results(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32], ids=str)
    def test_error_of_log_prob_is_at_most_twice_upstreams(self, dtype):
        super().test_error_of_log_prob_is_at_most_twice_upstreams(dtype)

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        expected = D.kl_divergence(self.upstream(p), self.upstream(q))
        for one, other in ((self.build(p), self.build(q)), (self.build(p), self.upstream(q))):
            torch.testing.assert_close(D.kl_divergence(one, other), expected)


class TestIndependentBeta(TestBeta):
    event = (4,)

    def build(self, params):
        # Around fastprob's: torch's own Beta cannot check the parameters of an empty batch.
        return F.recognize(D.Independent(F.Beta(**params), 1))

    def upstream(self, params):
        return D.Independent(D.Beta(**params), 1)


@pytest.mark.parametrize("sample", [(), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(40,), (0,), (5, 8)], ids=str)
@pytest.mark.parametrize("ndims", [0, 1])
@pytest.mark.parametrize("low", [0.02, 1.0, 300.0])
def test_scored_draws(low, ndims, shape, sample):
    """Without gradients: draws are torch's, scores as good as torch's of the same draw."""
    a, b = (low * (1 + torch.rand(shape) * 9) for _ in range(2))
    given = a.clone(), b.clone()
    ours = F.recognize(D.Independent(F.Beta(a, b), ndims) if ndims else F.Beta(a, b))
    theirs = D.Independent(D.Beta(a, b, False), ndims, validate_args=False)
    with torch.no_grad():
        torch.manual_seed(3)
        value, score = ours.sample_and_log_prob(sample)
        torch.manual_seed(3)
        assert torch.equal(value, theirs.sample(sample))
    assert torch.equal(a, given[0]) and torch.equal(b, given[1])
    assert score.shape == (*sample, *shape[: len(shape) - ndims])
    double = D.Independent(D.Beta(a.double(), b.double(), False), ndims, validate_args=False)
    exact = double.log_prob(value.double())
    if score.numel():
        # Half an epsilon of a sum of a few numbers, where torch happens to be exact.
        least = torch.finfo(a.dtype).eps * exact.abs().max()
        allowed = 2 * (theirs.log_prob(value) - exact).abs().max() + least
        assert (score - exact).abs().max() <= allowed


@pytest.mark.parametrize("high", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "mode", "mean"])
def test_projection_of_values_between_0_and_1(kind, dtype, high):
    """A spec that holds all of them leaves them as they are, but for its type."""
    spec = Bounded(0.0, high, shape=(4,), dtype=dtype)
    names = ["concentration1", "concentration0"]
    td = TensorDict({name: torch.rand(6, 4) * 3 + 0.5 for name in names}, [6])
    results = []
    for safe in (True, False):
        module = SafeProbabilisticModule(
            names,
            ["action"],
            spec,
            safe=safe,
            distribution_class=F.Beta,
            default_interaction_type=kind,
        )
        torch.manual_seed(0)
        results.append(module(td.copy())["action"])
    projected, plain = results
    assert plain.max() > 0.5
    assert projected.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(projected, plain.clamp(0, high).to(dtype))


def test_medians_of_all_sizes():
    a, b = torch.meshgrid(GRID, GRID, indexing="ij")
    found = F.Beta(a, b).median.numpy()
    np.testing.assert_allclose(found, scipy.stats.beta(a, b).median(), rtol=1e-9, atol=1e-300)


def test_a_large_median_is_not_worked_out_at_every_node_of_every_step():
    # 32,768 elements took 9 quadratures of 136 nodes, 40 million exponentials of 3 s.
    draw = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 64, 8, generator=draw) * 3 + 0.1
    made = 0

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal made
            out = func(*args, **(kwargs or {}))
            if func is torch.exp and isinstance(out, torch.Tensor):
                made += out.numel()
            return out

    with Counted():
        found = F.Beta(a, b).median
    assert made <= 150 * a.numel()
    np.testing.assert_allclose(found, scipy.stats.beta(a, b).median(), rtol=3e-7)


def test_gradients_of_points():
    a = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.5, 0.7, 4.0], dtype=torch.float64, requires_grad=True)
    for name in ("median", "mean", "mode", "variance"):
        assert torch.autograd.gradcheck(lambda a, b, n=name: getattr(F.Beta(a, b), n), (a, b))


@pytest.mark.parametrize(
    ("a", "b", "mode"),
    [(0.3, 0.5, 0), (0.5, 0.3, 1), (0.5, 0.5, 1), (1, 1, 0.5), (0.3, 1, 0), (1, 0.3, 1), (2, 1, 1)],
)
def test_modes_at_the_ends(a, b, mode):
    assert F.Beta(float(a), float(b)).mode.item() == mode


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["concentration1", "concentration0"])
def test_bad_parameters(name, value):
    params = {"concentration1": torch.ones(2), "concentration0": torch.ones(2)}
    params[name] = torch.tensor([1.0, value])
    with pytest.raises(ValueError, match=rf"Beta expects {name} to be greater than 0.*\(1,\)"):
        F.Beta(**params, validate_args=True)
