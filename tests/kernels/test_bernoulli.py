"""Bernoulli's kernels against the reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from fastprob import SafeProbabilisticModule, backend
from fastprob.counter import CounterStream
from fastprob.distributions.bernoulli import Bernoulli, IndependentBernoulli, recognize
from fastprob.kernels import bernoulli as kernels
from fastprob.kernels._launch import State
from fastprob.reference import bernoulli as reference
from fastprob.reference import philox
from fastprob.specs import Binary
from tests.kernels.accuracy import DTYPES, SIZES, Errors, check

SEED = 21
# Elements of a gradient: the largest of few errors says little of either side.
ELEMENTS = 600
NONE = torch.Size()


def parameter(shape, dtype, device, from_probs):
    s = torch.randn(shape, device=device) * 3
    # The dtype's own epsilon bounds a probability; float64's is another.
    return (torch.sigmoid(s).clamp(0.01, 0.99) if from_probs else s).to(dtype)


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def independent(ndims=1, **given):
    return recognize(
        torch.distributions.Independent(
            torch.distributions.Bernoulli(**given, validate_args=False), ndims, validate_args=False
        )
    )


def scores(given, from_probs, value, ndims=1):
    """Score and entropy in the dtype of `given`, for autograd as well."""
    s = reference.logits(given) if from_probs else given
    return reference.log_prob(s, value.to(s.dtype), ndims), reference.entropy(s, ndims)


def own_scores(given, from_probs, value):
    """What PyTorch makes of it in the dtype of `given`."""
    if given.is_cpu and given.dtype is torch.float32:
        # The interpreter adds up a row one by one, 5 times as far off at A = 257 as by halves,
        # which is how PyTorch and a GPU do it. Here PyTorch's terms are added up one by one.
        terms = scores(given, from_probs, value, 0)
        return [torch.from_numpy(np.cumsum(t.numpy(), axis=-1))[..., -1] for t in terms]
    return scores(given, from_probs, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_probs", [False, True], ids=["logits", "probs"])
def test_draws_scores_and_entropies(from_probs, dtype, device):
    for a in SIZES:
        errors = Errors()
        for call, batch in enumerate(((), (5,), (3, 13))):
            given = parameter((*batch, a), dtype, device, from_probs)
            for state in (None, pair(device, call)):
                value, score, entropy, used = kernels.draw(
                    given, from_probs, NONE, 1, entropy=True, keep=True,
                    state=None if state is None else State(state),
                )  # fmt: skip
                assert torch.equal(value, reference._value(given, from_probs, state, NONE))
                assert used is state or torch.equal(used, state)
                own = own_scores(given, from_probs, value)
                truth = scores(given.double(), from_probs, value)
                errors.add(f"score {a}", score, own[0], truth[0])
                errors.add(f"entropy {a}", entropy, own[1], truth[1])
        errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_probs", [False, True], ids=["logits", "probs"])
def test_scores_of_given_values(from_probs, dtype, device):
    kinds = (dtype, torch.bool, torch.int64)
    for a in SIZES:
        errors = Errors()
        for (sample, batch), kind in zip(
            (((), ()), ((), (37,)), ((2,), (3, 4))), kinds, strict=True
        ):
            given = parameter((*batch, a), dtype, device, from_probs)
            value = (torch.rand((*sample, *batch, a), device=device) < 0.5).to(kind)
            got = kernels.score(given, from_probs, value, 1, entropy=True)
            own = own_scores(given, from_probs, value)
            truth = scores(given.double(), from_probs, value)
            errors.add(f"score {a}", got[0], own[0], truth[0])
            errors.add(f"entropy {a}", got[1], own[1], truth[1])
        errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_probs", [False, True], ids=["logits", "probs"])
def test_gradients(from_probs, dtype, device):
    # Nothing is summed here: a row is where its gradient comes from.
    for a in (1, 3, 8, 17, 64, 257):
        rows = ELEMENTS // a
        errors = Errors()
        for sample, state in (((), None), ((2,), pair(device))):
            sample = torch.Size(sample)
            given = parameter((rows, a), dtype, device, from_probs)
            value = reference._value(given, from_probs, state, sample)
            weights = [torch.randn(s, device=device).to(dtype) for s in ((*sample, rows), (rows,))]
            results = []
            for kind in (dtype, torch.float64):
                leaves = [t.to(kind).requires_grad_() for t in (given, value)]
                made = scores(leaves[0], from_probs, leaves[1])
                total = sum((m * w.to(kind)).sum() for m, w in zip(made, weights, strict=True))
                results.append(torch.autograd.grad(total, leaves))
            own, truth = results
            got = kernels.draw_backward(*weights, given, from_probs, state, sample, 1)
            errors.add(f"drawn {a}", got, own[0], truth[0])
            by_given, by_value = kernels.score_backward(
                *weights, given, from_probs, value, 1, to_value=True
            )
            errors.add(f"given {a}", by_given, own[0], truth[0])
            errors.add(f"value {a}", by_value, own[1], truth[1])
        errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends(dtype, device):
    """A certain value is always drawn; its score is that of torch, as near to 0 as torch goes."""
    probs = torch.tensor([0.0, 1.0], device=device, dtype=dtype).repeat(512, 1)
    value, score, entropy, used = kernels.draw(
        probs, True, NONE, 1, state=State(pair(device)), entropy=True, keep=True
    )
    assert torch.equal(value, probs)
    eps = torch.finfo(dtype).eps
    expected = torch.full_like(score, 2 * math.log1p(-eps))
    torch.testing.assert_close(score, expected, rtol=4 * eps + 1e-4, atol=0)
    h = -eps * math.log(eps) - (1 - eps) * math.log1p(-eps)
    expected = torch.full_like(entropy, 2 * h)
    torch.testing.assert_close(entropy, expected, rtol=4 * eps + 1e-5, atol=0)
    grad = kernels.draw_backward(score, entropy, probs, True, used, NONE, 1)
    assert torch.equal(grad, torch.zeros_like(grad))

    logits = torch.tensor([-math.inf, math.inf], device=device, dtype=dtype).repeat(512, 1)
    value, score, _, _ = kernels.draw(logits, False, NONE, 1, state=State(pair(device)))
    assert torch.equal(value, probs)
    assert torch.equal(score, torch.zeros_like(score))


def test_a_half_is_a_zero(device):
    """Of two values that are equally probable the smaller one is the mode."""
    for from_probs, middle in ((True, 0.5), (False, 0.0)):
        value = kernels.draw(
            torch.full((3, 4), middle, device=device), from_probs, NONE, 1, state=None
        )[0]
        assert torch.equal(value, torch.zeros(3, 4, device=device))


def test_small_probabilities_are_met(device):
    """No word is below its own step, so that p is met as far as 2^-32."""
    words = torch.stack(philox.words(torch.tensor(SEED), torch.tensor(0), torch.arange(1024)), -1)
    least = words.view(-1).argmin()
    p = (words.view(-1)[least] + 1).double() * 2.0**-32
    assert p < 2.0**-11
    for scale, drawn in ((1.0 + 1e-6, 1), (1.0 - 1e-6, 0)):
        probs = torch.full((4096,), float(p * scale), device=device)
        value = kernels.draw(probs, True, NONE, 0, state=State(pair(device)))[0]
        assert value.sum() == value[least] == drawn


def test_nan_parameters_come_through(device):
    given = torch.tensor([[math.nan, 0.0], [0.0, 0.0]], device=device)
    for from_probs in (False, True):
        _, score, entropy, _ = kernels.draw(
            given, from_probs, NONE, 1, state=State(pair(device)), entropy=True
        )
        assert score.isnan().tolist() == entropy.isnan().tolist() == [True, False]


def test_values_between_zero_and_one_are_scored_in_part(device):
    given = parameter((4, 6), torch.float32, device, False)
    value = torch.rand(4, 6, device=device)
    for from_probs in (False, True):
        par = torch.sigmoid(given) if from_probs else given
        got = kernels.score(par, from_probs, value, 1)[0]
        truth = scores(par.double(), from_probs, value.double())[0]
        check("score", got, scores(par, from_probs, value)[0], truth)


@pytest.mark.parametrize("a", [1, 3, 8, 1500])
def test_strided_and_expanded_parameters_are_read_where_they_lie(a, device):
    rows = 2 if a > 100 else 5
    both = torch.randn(rows, 2 * a, device=device)
    column = torch.randn(rows, 1, device=device).expand(rows, a)
    turned = torch.randn(a, rows, device=device).T
    for given in (both.chunk(2, -1)[1], column, turned):
        for sample in ((), (2,)):
            arguments = (False, torch.Size(sample), 1)
            state = State(pair(device))
            got = kernels.draw(given, *arguments, state=state, entropy=True)
            plain = kernels.draw(given.contiguous(), *arguments, state=state, entropy=True)
            for g, p in zip(got[:3], plain[:3], strict=True):
                assert torch.equal(g, p)
        value = (turned > 0).expand(2, rows, a)
        got = kernels.score(given, False, value, 1)[0]
        plain = kernels.score(given.contiguous(), False, value.contiguous(), 1)[0]
        assert torch.equal(got, plain)


def test_event_dimensions_are_summed_together(device):
    given = parameter((4, 2, 3, 5), torch.float32, device, False)
    for ndims in range(5):
        value, score, entropy, _ = kernels.draw(
            given, False, torch.Size((2,)), ndims, state=State(pair(device)), entropy=True
        )
        truth = scores(given.double(), False, value, ndims)
        torch.testing.assert_close(score.double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_empty(shape, device):
    logits = torch.empty(shape, device=device, requires_grad=True)
    value, score = independent(logits=logits).sample_and_log_prob()
    assert value.shape == shape and score.shape == shape[:-1]
    assert torch.equal(score, torch.zeros_like(score))
    score.sum().backward()
    assert logits.grad.shape == shape


def test_the_draw_is_that_of_the_reference_stream(device):
    probs = torch.rand(1000, 7, device=device)
    stream = CounterStream(SEED, device=device)
    for call in range(3):
        value, _ = Bernoulli(probs=probs).sample_and_log_prob(generator=stream)
        assert torch.equal(value, philox.bernoulli(pair(device, call), probs))
    assert stream.state.tolist() == [SEED, 3]


def test_operators(device):
    for sample, from_probs in (([], False), ([2], True)):
        given = torch.rand(4, 6, device=device, requires_grad=True)
        value = torch.rand(*sample, 4, 6, device=device, requires_grad=True)
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                torch.library.opcheck(
                    torch.ops.fastprob.bernoulli_draw.default,
                    (given, from_probs, pair(device), sample, 1, True, True, True),
                )
                torch.library.opcheck(
                    torch.ops.fastprob.bernoulli_score.default, (given, from_probs, value, 1, True)
                )


def test_operators_of_both_backends_agree(device):
    for from_probs in (False, True):
        given = parameter((4, 6), torch.float32, device, from_probs)
        x = (torch.rand(3, 4, 6, device=device) < 0.5).float()
        made = {}
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                made[back] = []
                for random in (True, False):
                    leaves = [given.clone().requires_grad_(), x.clone().requires_grad_()]
                    out = torch.ops.fastprob.bernoulli_draw(
                        leaves[0], from_probs, pair(device) if random else None, [3], 1, random,
                        True, True,
                    )  # fmt: skip
                    out += torch.ops.fastprob.bernoulli_score(leaves[0], from_probs, leaves[1], 1,
                                                              True)  # fmt: skip
                    total = sum(out[i].square().sum() for i in (1, 2, 4, 5))
                    made[back] += [*out, *torch.autograd.grad(total, leaves)]
        for got, expected in zip(made["triton"], made["reference"], strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_vmap(device):
    logits = parameter((5, 4, 6), torch.float32, device, False)
    value = (torch.rand(2, 5, 4, 6, device=device) < 0.5).float()
    got = torch.vmap(lambda s, v: independent(logits=s).log_prob(v), in_dims=(0, 1))(logits, value)
    expected = independent(logits=logits).log_prob(value).transpose(0, 1)
    torch.testing.assert_close(got, expected)
    draw = torch.vmap(lambda s: independent(logits=s).sample_and_log_prob(), randomness="same")
    value, score = draw(torch.zeros_like(logits))
    assert torch.equal(value[0], value[3]) and torch.equal(score[0], score[3])
    draw = torch.vmap(lambda s: independent(logits=s).sample(), randomness="different")
    assert not torch.equal(*draw(torch.zeros_like(logits))[:2])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda s: independent(logits=s).sample())(logits)


def test_the_operator_under_vmap(device):
    logits = parameter((5, 4, 6), torch.float32, device, False)
    value = (torch.rand(2, 5, 4, 6, device=device) < 0.5).float()
    op = torch.ops.fastprob.bernoulli_score
    got = torch.vmap(lambda s, v: op(s, False, v, 1, True), in_dims=(0, 1))(logits, value)
    score, entropy = op(logits, False, value, 1, True)
    assert torch.equal(got[0], score.transpose(0, 1)) and torch.equal(got[1], entropy)


# torch 2.13: the first use of forward mode compiles decompositions with torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_functorchs_gradients(device):
    logits = parameter((4, 6), torch.float32, device, False)
    value = (logits > 1).float()
    tangent = torch.randn_like(logits)

    def both(s):
        dist = independent(logits=s)
        return dist.log_prob(value).sum() + dist.entropy().square().sum()

    def drawn(s):
        value, score = independent(logits=s).sample_and_log_prob()
        return score.sum(), value

    results = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            jvp = torch.func.jvp(both, (logits,), (tangent,))[1]
            results.append([torch.func.grad(both)(logits), jvp])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    grad, value = torch.func.grad(drawn, has_aux=True)(logits)
    torch.testing.assert_close(grad, value - torch.sigmoid(logits))


def test_compiled_equals_eager(device):
    logits = parameter((5, 6), torch.float32, device, False)

    def call(s):
        dist = IndependentBernoulli.__new__(IndependentBernoulli)
        dist._given, dist._from_probs, dist._log_odds, dist._ndims = s, False, None, 1
        value, score = dist.sample_and_log_prob()
        return value, score, dist.log_prob(value), dist.entropy(), dist.mode

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaf = logits.clone().requires_grad_()
        out = function(leaf)
        assert not out[0].requires_grad
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), [leaf])]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


def test_score_and_entropy_are_one_launch(device, monkeypatch):
    launches = []
    original = kernels.score
    monkeypatch.setattr(kernels, "score", lambda *a, **k: launches.append(1) or original(*a, **k))
    leaf = parameter((5, 6), torch.float32, device, False).requires_grad_()
    value = torch.zeros_like(leaf)
    dist = independent(logits=leaf * 1.0)
    score, entropy = dist.log_prob(value), dist.entropy()
    assert len(launches) == 1
    (grad,) = torch.autograd.grad(score.sum() + entropy.sum(), leaf)
    with backend.using_backend("reference"):
        again = independent(logits=leaf)
        expected = again.log_prob(value), again.entropy()
        torch.testing.assert_close((score, entropy), expected)
        (expected,) = torch.autograd.grad(sum(e.sum() for e in expected), leaf)
    torch.testing.assert_close(grad, expected)


def test_what_the_score_kept_serves_no_other_call(device):
    """An entropy without gradients, one after an update in place, and a leaf's second backward."""
    leaf = parameter((5, 6), torch.float32, device, False).requires_grad_()
    value = torch.zeros_like(leaf)
    given = leaf * 1.0
    dist = independent(logits=given)
    with torch.no_grad():
        dist.log_prob(value)
    assert dist.entropy().requires_grad
    dist.log_prob(value)
    with torch.no_grad():
        given.mul_(0.0)
    torch.testing.assert_close(
        dist.entropy(), torch.full((5,), 6 * math.log(2), device=device), rtol=1e-6, atol=0
    )
    dist = independent(logits=leaf)
    dist.log_prob(value).sum().backward()
    dist.entropy().sum().backward()


def test_the_modules_value_needs_no_projection(device):
    module = SafeProbabilisticModule(
        ["logits"], ["action"], spec=Binary(6), safe=True, return_log_prob=True,
        distribution_class=Bernoulli, default_interaction_type="random",
    )  # fmt: skip
    launches = []
    module._projections["action"] = _Counted(module._projections["action"], launches)
    out = module(TensorDict(logits=torch.randn(5, 6, device=device), batch_size=[5]))
    assert not launches
    assert set(out["action"].unique().tolist()) <= {0.0, 1.0}
    module(TensorDict(action=torch.full((5, 6), 0.7), logits=out["logits"], batch_size=[5]),
           _requires_sample=False)  # fmt: skip
    assert launches


class _Counted:
    def __init__(self, projection, calls):
        self.projection, self.calls, self.covers = projection, calls, projection.covers

    def __call__(self, value):
        self.calls.append(1)
        return self.projection(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "does not broadcast"),
        (torch.zeros(2, 3, device="meta"), "given a value on"),
    ],
)
def test_a_value_that_does_not_fit(value, message, device):
    dist = independent(logits=torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match=message):
        dist.log_prob(value if value.is_meta else value.to(device))
