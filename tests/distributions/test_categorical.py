"""Categorical and OneHotCategorical against scipy, and against sums over the categories."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torchrl.modules as rl
from tensordict.nn import InteractionType
from tensordict.nn.distributions import OneHotCategorical as TdOneHot
from torch import distributions as D

from fastprob import distributions as F
from fastprob.reference import categorical as reference
from tests.distributions._suite import JOINTS, Suite

K = 5


class TestCategoricalLogits(Suite):
    event = ()
    discrete = True
    pathwise = False
    value_grad = False
    key = "logits"

    def params(self, batch, dtype=torch.float64):
        return {"logits": torch.randn(*batch, K, dtype=dtype) * 2}

    def build(self, params):
        return F.Categorical(**params)

    def upstream(self, params):
        return D.Categorical(**params)

    def probs(self, params):
        return scipy.special.softmax(params["logits"], -1)

    def index(self, value):
        return value

    def log_prob(self, params, value):
        index = self.index(value)
        exact = np.broadcast_to(np.log(self.probs(params)), (*index.shape, K))
        return np.take_along_axis(exact, index[..., None], -1)[..., 0]

    def entropy(self, params):
        return scipy.stats.entropy(self.probs(params), axis=-1)

    def points(self, params):
        probs = self.probs(params)
        rows = [
            scipy.stats.rv_discrete(values=(np.arange(K), p / p.sum()))
            for p in probs.reshape(-1, K)
        ]
        shape = probs.shape[:-1]
        return {
            "mode": probs.argmax(-1),
            "median": np.array([r.median() for r in rows]).reshape(shape),
            "mean": np.array([r.mean() for r in rows]).reshape(shape),
        }

    @pytest.mark.parametrize("sample", [(4000,), (1,)], ids=str)
    def test_draws_follow_the_probabilities(self, sample):
        # One draw of many rows and many draws of one row are drawn by different calls.
        rows = 4000 // sample[0]
        params = {k: v[:1].expand(rows, K) for k, v in self.params((1,)).items()}
        drawn = torch.as_tensor(self.index(self.build(params).sample(sample).numpy()))
        counts = np.bincount(drawn.flatten(), minlength=K)
        probs = self.probs(self.arrays(params))[0]
        assert scipy.stats.chisquare(counts, 4000 * probs / probs.sum()).pvalue > 0.01
        wrong = np.roll(probs, 1)
        assert scipy.stats.chisquare(counts, 4000 * wrong / wrong.sum()).pvalue < 1e-6

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        expected = D.kl_divergence(self.upstream(p), self.upstream(q))
        found = D.kl_divergence(self.build(p), self.build(q))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_logits_and_probs_are_normalized(self):
        params = self.params((2, 3))
        dist, exact = self.build(params), self.probs(self.arrays(params))
        np.testing.assert_allclose(dist.probs.numpy(), exact, rtol=1e-12)
        np.testing.assert_allclose(dist.logits.numpy(), np.log(exact), rtol=1e-10)
        assert dist.param_shape == (2, 3, K)

    def test_enumerated_support_has_mass_1(self):
        dist = self.build(self.params((3,)))
        for expand in (True, False):
            total = dist.log_prob(dist.enumerate_support(expand)).exp().sum(0)
            torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))

    @pytest.mark.parametrize("joint", JOINTS)
    def test_joint_scores_have_the_gradients_of_log_prob(self, joint):
        params = self.leaves()
        dist = self.build(params)
        value, score = getattr(dist, joint)((2,))
        expected = torch.autograd.grad(
            self.build(params).log_prob(value.detach()).sum(), list(params.values())
        )
        for a, b in zip(
            torch.autograd.grad(score.sum(), list(params.values())), expected, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    # The gradients of a discrete draw: the test above.
    test_gradients_of_draws = None

    # torch.multinomial, which upstream draws by as well, refuses randomness="same".
    @pytest.mark.parametrize("randomness", ["different"])
    def test_vmap_of_draws(self, randomness):
        super().test_vmap_of_draws(randomness)


class TestCategoricalProbs(TestCategoricalLogits):
    key = "probs"

    def params(self, batch, dtype=torch.float64):
        return {"probs": torch.rand(*batch, K, dtype=dtype) + 0.05}

    def probs(self, params):
        return params["probs"] / params["probs"].sum(-1, keepdims=True)


class TestOneHotLogits(TestCategoricalLogits):
    event = (K,)
    pathwise = True

    def build(self, params):
        return F.OneHotCategorical(**params)

    def upstream(self, params):
        return rl.OneHotCategorical(**params)

    def index(self, value):
        return value.argmax(-1)

    def points(self, params):
        points = super().points(params)
        eye = np.eye(K)
        return {
            "mode": eye[points["mode"]],
            "median": eye[points["median"].astype(int)],
            "mean": self.probs(params),
        }

    def test_draws_are_one_hot_integers(self):
        drawn = self.build(self.params((3,))).sample((2,))
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn.sum(-1), torch.ones(2, 3, dtype=torch.int64))
        assert drawn.max() == 1 and drawn.min() == 0

    @pytest.mark.parametrize("joint", [False, True])
    def test_rsample_hands_the_gradient_to_the_probabilities(self, joint):
        params = self.leaves()
        weights = torch.randn(3, K, dtype=torch.float64)
        dist = self.build(params)
        value = dist.rsample_and_log_prob()[0] if joint else dist.rsample()
        found = torch.autograd.grad((value * weights).sum(), list(params.values()))
        probs = self.build(params).probs
        expected = torch.autograd.grad((probs * weights).sum(), list(params.values()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class TestOneHotProbs(TestOneHotLogits):
    params = TestCategoricalProbs.params
    probs = TestCategoricalProbs.probs


class TestOneHotOfTensordict(TestOneHotLogits):
    def upstream(self, params):
        return TdOneHot(**params)


class _ByPasses:
    """The same tests where rows are normalized in passes, as many short ones on a CPU are."""

    @pytest.fixture(autouse=True)
    def small_ones_too(self, monkeypatch):
        monkeypatch.setattr(reference, "_LEAST", 1)
        assert reference.by_passes(torch.zeros(1, K, dtype=torch.float64))


class TestCategoricalLogitsByPasses(_ByPasses, TestCategoricalLogits):
    pass


class TestCategoricalProbsByPasses(_ByPasses, TestCategoricalProbs):
    pass


class TestOneHotLogitsByPasses(_ByPasses, TestOneHotLogits):
    pass


SHAPES = [(4096, 8), (300, 4, 3), (200, 16), (40, 64), (1, 5000)]
LAYOUTS = {
    "dense": lambda x: x,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "categories first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_draws_are_upstreams(kind, dtype, shape, layout):
    torch.manual_seed(3)
    given = LAYOUTS[layout](torch.randn(shape, dtype=dtype) * 2)
    if kind == "probs":
        given = given.exp()
    for sample in ((), (1,)):
        for generator in (None, torch.Generator().manual_seed(5)):
            torch.manual_seed(7)
            wanted = D.Categorical(**{kind: given})
            with torch.no_grad():
                if generator is not None:
                    torch.manual_seed(5)
                index = wanted.sample(sample)
                # Where the stream stands after the draw.
                after = torch.rand(3)
                torch.manual_seed(7)
                dist = F.Categorical(**{kind: given})
                found, score = dist.sample_and_log_prob(sample, generator=generator)
            assert torch.equal(found, index)
            assert torch.equal(torch.rand(3, generator=generator), after)
            exact = D.Categorical(**{kind: given.double()}).log_prob(index)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(score.double(), exact, rtol=4 * eps, atol=4 * eps)
            torch.testing.assert_close(score, dist.log_prob(found), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0, 1000.0, -1000.0, 1e5], ids=lambda x: f"{x:g}")
def test_short_rows_of_any_size_keep_their_digits(dtype, offset):
    # The exponentials of these logits would overflow, or be 0.
    logits = torch.randn(512, 8, dtype=dtype) * 3 + offset
    logits[::2] -= 7 * offset / 8
    logits[:100, 3] = -float("inf")
    assert reference.by_passes(logits)
    dist, exact = F.Categorical(logits=logits), logits.double().log_softmax(-1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dist.logits.double(), exact, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(
        dist.entropy().double(), D.Categorical(logits=exact).entropy(), rtol=0, atol=40 * eps
    )
    for take in (dist.sample_and_log_prob, lambda: dist.take(InteractionType.MODE, score=True)):
        index, score = take()
        wanted = exact.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(score.double(), wanted, rtol=4 * eps, atol=4 * eps)
        assert (index[:100] != 3).all()
    assert torch.equal(dist.mode, logits.argmax(-1))


def test_weights_of_any_size_keep_their_digits():
    probs = torch.rand(512, 8) + 0.01
    for factor in (1e-35, 1.0, 1e35):
        dist = F.Categorical(probs=probs * factor)
        torch.manual_seed(3)
        index, score = dist.sample_and_log_prob()
        torch.manual_seed(3)
        assert torch.equal(index, D.Categorical(probs=probs.double()).sample())
        exact = D.Categorical(probs=probs.double()).log_prob(index)
        torch.testing.assert_close(score.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (512, 8)], ids=str)
@pytest.mark.parametrize("cls", [F.Categorical, F.OneHotCategorical])
def test_the_mode_is_the_first_of_equals(shape, cls):
    dist = cls(logits=torch.zeros(shape))
    index = dist.mode if cls is F.Categorical else dist.mode.argmax(-1)
    assert (index == 0).all()
    scored, log_prob = dist.take(InteractionType.MODE, score=True)
    assert torch.equal(scored, dist.mode)
    torch.testing.assert_close(log_prob, torch.full(shape[:-1], -np.log(shape[-1])).float())


def test_gradients_of_short_rows():
    logits = torch.randn(512, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(512, 8, dtype=torch.float64)
    assert reference.by_passes(logits)

    def derivatives(log_probs):
        (first,) = torch.autograd.grad((log_probs * weights).sum(), logits, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), logits)[0]

    found = derivatives(F.Categorical(logits=logits).logits)
    expected = derivatives(logits.log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 64, 65])
def test_one_hot_vectors(count):
    for size in ((), (7,), (2, 0), (2, 5)):
        index = torch.randint(0, count, size)
        with torch.inference_mode():
            found = reference.one_hot(index, count)
        assert torch.equal(found, torch.nn.functional.one_hot(index, count))
        found = reference.one_hot(index, count)
        found.zero_()  # the caller's own: the next ones are as they should be
        assert torch.equal(
            reference.one_hot(index, count), torch.nn.functional.one_hot(index, count)
        )


@pytest.mark.parametrize("strategy", ["RelaxedOneHot", rl.ReparamGradientStrategy.RelaxedOneHot])
def test_relaxed_gradients_are_those_of_torchs_relaxed_distribution(strategy):
    logits = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, K, dtype=torch.float64)
    torch.manual_seed(5)
    value = F.OneHotCategorical(logits=logits, grad_method=strategy).rsample()
    (found,) = torch.autograd.grad((value * weights).sum(), logits)
    torch.manual_seed(5)
    one = torch.tensor(1.0, dtype=torch.float64)
    relaxed = D.RelaxedOneHotCategorical(one, logits=logits).rsample()
    (expected,) = torch.autograd.grad((relaxed * weights).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(value.argmax(-1), relaxed.argmax(-1))
    torch.testing.assert_close(value.sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("cls", [F.Categorical, F.OneHotCategorical])
def test_impossible_categories(cls):
    logits = torch.tensor([0.0, float("-inf"), 0.0], dtype=torch.float64, requires_grad=True)
    dist = cls(logits=logits, validate_args=False)
    np.testing.assert_allclose(dist.entropy().item(), np.log(2))
    (grad,) = torch.autograd.grad(dist.entropy(), logits)
    assert grad.isfinite().all()
    drawn = dist.sample((500,))
    index = drawn if cls is F.Categorical else drawn.argmax(-1)
    assert set(index.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("probs", "median"),
    [
        ([0.5, 0.5, 0.0], 0),
        ([0.2, 0.3, 0.5], 1),
        ([0.1, 0.2, 0.7], 2),
        ([0.1] * 10, 4),
        ([1.0], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_medians_at_exactly_a_half(probs, median, dtype):
    assert F.Categorical(probs=torch.tensor(probs, dtype=dtype)).median.item() == median


@pytest.mark.parametrize("cls", [F.Categorical, F.OneHotCategorical])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "neither"),
        ({"logits": torch.zeros(2), "probs": torch.ones(2)}, "both"),
        ({"logits": torch.tensor(0.0)}, "scalar"),
        ({"logits": torch.tensor([0.0, float("nan")])}, r"logits.*index \(1,\)"),
        ({"probs": torch.tensor([0.5, -0.5])}, r"probs.*index \(1,\)"),
        ({"probs": torch.tensor([[0.5, 0.5], [0.0, 0.0]])}, "positive sum"),
    ],
    ids=["neither", "both", "scalar", "nan", "negative", "no mass"],
)
def test_bad_parameters(cls, params, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{message}"):
        cls(**params, validate_args=True)


@pytest.mark.parametrize("cls", [F.Categorical, F.OneHotCategorical])
def test_integer_parameters_become_floats(cls):
    dist = cls(logits=torch.tensor([0, 0, 0, 0]))
    assert dist.entropy().item() == pytest.approx(np.log(4))


def test_a_value_of_another_number_of_categories():
    with pytest.raises(ValueError, match="4 categories"):
        F.OneHotCategorical(logits=torch.zeros(4)).log_prob(torch.tensor([0, 1, 0]))
