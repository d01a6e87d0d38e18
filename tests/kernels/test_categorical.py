"""The categorical kernels against the reference in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict.nn import InteractionType

from fastprob import backend
from fastprob.counter import CounterStream
from fastprob.distributions.categorical import Categorical, OneHotCategorical
from fastprob.distributions.masked_categorical import MaskedCategorical, MaskedOneHotCategorical
from fastprob.distributions.ordinal import OneHotOrdinal, Ordinal
from fastprob.kernels import categorical as kernels
from fastprob.kernels._launch import State
from fastprob.reference import categorical as reference
from fastprob.reference import philox
from tests.kernels.accuracy import DTYPES, SIZES, Errors

SEED = 21
EMPTY = torch.Size()
RANDOM, MEDIAN, MODE, MEAN = range(4)
NO_VALUE, MEAN_INDEX, ONE_HOT, PROBS = range(4)
# Powers of two are laid out by another rule than other sizes; 48 is where a row takes two lanes.
MORE_SIZES = (*SIZES, 16, 48, 500)
# Longer than a tile: whole chunks, and a chunk that ends early.
WIDE = (4096, 5003)
ROWS = 300


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def logits_of(shape, dtype, device):
    return (torch.randn(shape, device=device) * 2.0).to(dtype)


def weights_of(shape, dtype, device):
    made = torch.rand(shape, device=device)
    made[..., 1::3] = 0.0
    return (made + 0.01 * (torch.arange(shape[-1], device=device) == 0)).to(dtype)


def masks_of(shape, device):
    """No mask, one of half the categories, one of a single category of each row."""
    some = torch.rand(shape, device=device) < 0.5
    one = torch.zeros(shape, dtype=torch.bool, device=device)
    one.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), device=device), True)
    return None, some | one, one


def form(kind, value=NO_VALUE, dtype=torch.int64):
    return kernels.Form(kind, True, value, dtype)


def masked(x, mask):
    return x if mask is None else torch.where(mask, x, -math.inf)


def check_draws(index, given, mask, probs, state):
    """Asserts that draws are those of the reference stream, but for what rounding decides.

    Running sums in fp32 are off by up to A / 2 steps of 2^-24 of the whole sum, and less in parts:
    no draw may differ whose uniform is further than that from the border of its category.
    """
    x = masked(given.double(), mask)
    weights = reference.weights(x, probs)
    running = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    unit = philox.uniform(state, index.shape, torch.float64)
    running = running.expand(*index.shape, -1)
    assert (weights.expand_as(running).gather(-1, index.unsqueeze(-1)) > 0).all()
    upper = running.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    lower = torch.where(
        index > 0, running.gather(-1, (index - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1), 0.0
    )
    slack = given.shape[-1] / 2 * 2.0**-24 + 2.0**-22
    assert (unit < upper + slack).all() and (unit >= lower - slack).all()
    expected = reference.first_beyond(weights, unit)
    return int((index != expected).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_scores_and_entropies(dtype, device):
    errors = Errors()
    other = drawn = 0
    kinds = itertools.cycle(range(4))
    for a in (*MORE_SIZES, *WIDE):
        batches = ((2,),) if a > 1000 else ((), (3, 2), (max(ROWS // a, 5),))
        for call, batch in enumerate(batches):
            logits = logits_of((*batch, a), dtype, device)
            weights = weights_of((*batch, a), dtype, device)
            cases = [(logits, mask, False) for mask in masks_of(logits.shape, device)]
            cases.append((weights, None, True))
            for given, mask, probs in (cases[next(kinds)], cases[next(kinds)]):
                state = pair(device, call)
                index, _, score, entropy, used = kernels.draw(
                    given, mask, EMPTY, form(RANDOM), state=State(state), probs=probs,
                    entropy=True, keep=True,
                )  # fmt: skip
                assert torch.equal(used, state)
                other += check_draws(index, given, mask, probs, state)
                drawn += index.numel()
                own = reference.score_and_entropy(given, mask, index, probs, True)
                truth = _truth(given, mask, index, probs)
                errors.add(f"score {probs}", score, own[0], truth[0], truth[0].abs() + 1.0)
                errors.add(f"entropy {probs}", entropy, own[1], truth[1], truth[1].abs() + 1.0)
        next(kinds)
    errors.check()
    # In a trial of 25,600 draws none was another than the reference's.
    assert other <= 1 + drawn / 500


def _truth(given, mask, index, probs):
    """Scores and entropies in float64; weights are clamped by the epsilon of their own dtype."""
    if not probs:
        return reference.score_and_entropy(given.double(), mask, index, False, True)
    eps = torch.finfo(given.dtype).eps
    wide = given.double()
    log_probs = (wide / wide.sum(-1, keepdim=True)).clamp(eps, 1 - eps).log()
    return reference.pick(log_probs, index), reference.entropy(log_probs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_values(dtype, device):
    errors = Errors()
    kinds = itertools.cycle(range(4))
    for a in (*MORE_SIZES, *WIDE):
        rows = 2 if a > 1000 else 5
        logits = logits_of((rows, a), dtype, device)
        # Ties: coarse logits.
        logits[0] = logits[0].round()
        weights = weights_of((rows, a), dtype, device)
        cases = [(logits, mask, False) for mask in masks_of(logits.shape, device)]
        given, mask, probs = (*cases, (weights, None, True))[next(kinds)]
        x = masked(given.double(), mask)
        p = reference.weights(x, probs)
        p = p / p.sum(-1, keepdim=True)

        def made(kind, value=NO_VALUE, dtype=dtype, given=given, mask=mask, probs=probs):
            return kernels.draw(
                given, mask, EMPTY, form(kind, value, dtype), probs=probs, score=kind == MODE
            )[:3]

        index, _, score = made(MODE)
        assert torch.equal(index, x.argmax(-1))
        own = reference.score_and_entropy(given, mask, index, probs, False)[0]
        truth = _truth(given, mask, index, probs)[0]
        errors.add(f"mode {probs}", score, own, truth, truth.abs() + 1.0)
        index, hot, _ = made(MEDIAN, ONE_HOT, torch.int64)
        running = p.cumsum(-1)
        at = running.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        before = at - p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        # Within the 4 steps of fp32 that count as having reached 1/2, and rounding.
        slack = a * 2.0**-25
        assert (at >= 0.5 - 5e-7 - slack).all() and (before < 0.5 + slack).all()
        assert hot.dtype is torch.int64 and torch.equal(hot.argmax(-1), index)
        assert torch.equal(hot.sum(-1), torch.ones_like(index))
        own = given / given.sum(-1, keepdim=True)
        own = own if probs else torch.softmax(masked(given, mask), -1)
        errors.add("probs", made(MEAN, PROBS)[1], own, p)
        mean = (p * torch.arange(a, device=device)).sum(-1)
        own = reference.mean_index(own.log())
        got = made(MEAN, MEAN_INDEX)[1]
        errors.add("mean", got.float() / a, own.float() / a, mean / a)
    errors.check()


def _gradient(given, mask, index, probs, value, mean_index, weights):
    """The gradient by `given` of the weighted outputs, by autograd, and what they are made of."""
    leaf = given.detach().clone().requires_grad_()
    x = masked(leaf, mask)
    p = leaf / leaf.sum(-1, keepdim=True) if probs else torch.softmax(x, -1)
    eps = torch.finfo(torch.bfloat16 if given.dtype is torch.float64 else given.dtype).eps
    log_probs = p.clamp(eps, 1 - eps).log() if probs else torch.log_softmax(x, -1)
    by_value, by_score, by_entropy = weights
    total = (reference.entropy(log_probs) * by_entropy).sum()
    if index is not None:
        scores = reference.pick(log_probs, index)
        total = total + (torch.where(scores > -math.inf, scores, 0.0) * by_score).sum()
    if value:
        out = (p * torch.arange(p.shape[-1], device=p.device)).sum(-1) if mean_index else p
        total = total + (out * by_value).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, device):
    errors = Errors()
    sizes = [(a, ()) for a in (*SIZES, 48, *WIDE)] + [(a, (2,)) for a in (3, 64, 257)]
    for a, sample in sizes:
        rows = 2 if a > 1000 else max(ROWS // a // 2, 5)
        given = logits_of((rows, a), dtype, device)
        index = torch.randint(a, (*sample, rows), device=device)
        weights = [
            torch.randn(shape, device=device).to(dtype)
            for shape in ((*sample, rows, a), (*sample, rows), (rows,))
        ]
        cases = [(mask, value) for mask in masks_of(given.shape, device) for value in (0, 1, 2)]
        for mask, value in cases[:: 2 + 2 * bool(sample) + 3 * (a > 1000)]:
            mean_index = value == 2
            by_value = weights[0][..., 0] if mean_index else weights[0]
            grads = by_value if value else None, *weights[1:]
            got = kernels.backward(
                *grads, given, mask, index, torch.Size(sample), mean_index=mean_index
            )
            if sample:
                got = got.float().sum(0).to(dtype)
            arguments = mask, index, False, value, mean_index
            own = _gradient(given, *arguments, grads)
            wide = [None if g is None else g.double() for g in grads]
            truth = _gradient(given.double(), *arguments, wide)
            if mean_index:
                # The gradient of a mean grows with the number of categories.
                got, own, truth = got.float() / a, own.float() / a, truth / a
            errors.add(f"{value} of {len(sample)}", got, own, truth, truth.abs() + 1.0)
    errors.check()


@pytest.mark.parametrize("a", [1, 3, 8, 33, 257, 5003])
def test_gradients_of_weights(a, device):
    """In fp32, where a clamp to an epsilon stays the same one in float64."""
    rows = 2 if a > 1000 else 9
    given = weights_of((rows, a), torch.float32, device)
    index = torch.randint(a, (rows,), device=device)
    weights = [torch.randn(shape, device=device) for shape in ((rows, a), (rows,), (rows,))]
    for value, mean_index in ((0, False), (1, False), (1, True)):
        by_value = weights[0][:, 0] if mean_index else weights[0]
        grads = by_value if value else None, *weights[1:]
        got = kernels.backward(*grads, given, None, index, EMPTY, probs=True, mean_index=mean_index)
        leaf = given.double().requires_grad_()
        p = leaf / leaf.sum(-1, keepdim=True)
        log_probs = p.clamp(2.0**-23, 1 - 2.0**-23).log()
        total = (reference.pick(log_probs, index) * grads[1]).sum()
        total = total + (reference.entropy(log_probs) * grads[2]).sum()
        if value:
            out = (p * torch.arange(a, device=device)).sum(-1) if mean_index else p
            total = total + (out * by_value).sum()
        truth = torch.autograd.grad(total, leaf)[0]
        torch.testing.assert_close(
            got.double(), truth, rtol=1e-4, atol=2e-5 * (1.0 + float(truth.abs().max()))
        )


@pytest.mark.parametrize("a", [1, 3, 8, 33, 257, 5003])
def test_scores_of_stored_values(a, device):
    rows = 2 if a > 200 else 37
    logits = logits_of((rows, a), torch.float32, device)
    _, mask, _ = masks_of(logits.shape, device)
    for sample in ((), (3,)):
        index = torch.randint(a, (*sample, rows), device=device)
        hot = torch.nn.functional.one_hot(index, a)
        for allowed in (None, mask):
            truth = _truth(logits, allowed, index, False)
            low = torch.where(truth[0] == -math.inf, -50.0, truth[0])
            for value, given in ((index, False), (index.float(), False), (hot, True)):
                score, entropy, found = kernels.score(
                    logits, allowed, value, hot=given, neg_inf=-50.0, entropy=True, keep=True
                )
                torch.testing.assert_close(score.double(), low, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-5, atol=1e-5)
                assert found is None if not given else torch.equal(found, index)


def test_an_index_that_names_no_category_scores_nan(device):
    logits = torch.zeros(4, 3, device=device)
    score = kernels.score(logits, None, torch.tensor([-1, 0, 2, 3], device=device))[0]
    assert score.isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("a", [2, 5, 16, 40, 256, 300, 4096])
def test_one_allowed_category(a, device):
    rows = 2 if a > 1000 else 20
    logits = logits_of((rows, a), torch.float32, device) * 100.0
    mask = masks_of(logits.shape, device)[2]
    index, _, score, entropy, _ = kernels.draw(
        logits, mask, EMPTY, form(RANDOM), state=State(pair(device)), entropy=True
    )
    assert torch.equal(index, mask.int().argmax(-1))
    assert torch.equal(score, torch.zeros_like(score))
    assert torch.equal(entropy, torch.zeros_like(entropy))
    grad = kernels.backward(
        None, torch.ones_like(score), torch.ones_like(entropy) * 1e6, logits, mask, index, EMPTY
    )
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("a", [8, 33, 64, 300])
def test_what_has_no_probability_is_never_drawn(a, device):
    """Chosen so that running sums end between the steps of fp32, by uniforms of every size."""
    weights = torch.zeros(4, a, device=device)
    weights[0, 1::2] = 0.1
    weights[1, a // 2] = 1e-30
    weights[2, : a // 2] = 1.0 / 3.0
    weights[3, 1] = 1.0
    weights[3, 3:-1:4] = 2.0**-26
    weights = weights.repeat(8 + 900 // a, 1)
    for given, probs in ((weights, True), (weights.log(), False)):
        index = kernels.draw(
            given, None, EMPTY, form(RANDOM), state=State(pair(device)), probs=probs, score=False
        )[0]
        assert (weights.gather(-1, index.unsqueeze(-1)) > 0).all()


@pytest.fixture(params=["hundreds", "thousands"])
def many_rows(request):
    """Rows are laid out as in a batch of so many: those of 2561 to 8192 categories in tiles, or
    those that are read once in chunks of programs of one warp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FEW_WIDE", 0)
        if request.param == "thousands":
            patch.setattr(kernels, "FEW_CHUNKED", 0)
        kernels.tiling.cache_clear()
        yield request.param
    kernels.tiling.cache_clear()


@pytest.mark.parametrize("a", [2049, 4096, 5003, 8191, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_of_many(a, dtype, many_rows, device):
    once = kernels.tiling(3, a, dtype.itemsize, once=True)
    chunked = a > (8192 if many_rows == "hundreds" else 2560)
    assert (once.chunks > 0, kernels.tiling(3, a, dtype.itemsize).chunks > 0) == (chunked, a > 8192)
    if chunked:
        assert once.warps == (4 if many_rows == "hundreds" else 1)
    errors = Errors()
    logits = logits_of((3, a), dtype, device)
    other = 0
    for call, mask in enumerate(masks_of(logits.shape, device)):
        state = pair(device, call)
        index, hot, score, entropy, _ = kernels.draw(
            logits, mask, EMPTY, form(RANDOM, ONE_HOT), state=State(state), entropy=True
        )
        other += check_draws(index, logits, mask, False, state)
        assert torch.equal(hot, torch.nn.functional.one_hot(index, a))
        own = reference.score_and_entropy(logits, mask, index, False, True)
        truth = _truth(logits, mask, index, False)
        again = kernels.score(logits, mask, hot, hot=True, entropy=True, keep=True)
        assert torch.equal(again[2], index)
        for what, got in (("draw", (score, entropy)), ("given", again[:2])):
            errors.add(f"score {what}", got[0], own[0], truth[0], truth[0].abs() + 1.0)
            errors.add(f"entropy {what}", got[1], own[1], truth[1], truth[1].abs() + 1.0)
        grads = [torch.randn(size, device=device).to(dtype) for size in ((3, a), (3,), (3,))]
        got = kernels.backward(*grads, logits, mask, index, EMPTY)
        arguments = mask, index, False, 1, False
        truth = _gradient(logits.double(), *arguments, [g.double() for g in grads])
        own = _gradient(logits, *arguments, grads)
        errors.add("gradient", got, own, truth, truth.abs() + 1.0)
    errors.check()
    assert other <= 1


@pytest.mark.parametrize("a", [98, 257, 1001, 2047, 16383])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ends_of_rows_that_begin_within_a_vector(a, dtype, device):
    """The last row ends with the tensor, and a row may reach into one more chunk than others."""
    for k in (0, a - 1):
        logits = torch.full((9, a), -50.0, dtype=dtype, device=device)
        logits[:, k] = 3.0
        index, hot, score, entropy, _ = kernels.draw(
            logits, None, EMPTY, form(RANDOM, ONE_HOT), state=State(pair(device)), entropy=True
        )
        assert index.tolist() == [k] * 9
        assert torch.equal(hot, torch.nn.functional.one_hot(index, a))
        assert torch.equal(score, torch.zeros_like(score))
        one, none = torch.ones_like(score), torch.zeros_like(entropy)
        grad = kernels.backward(None, one, none, logits, None, index * 0, EMPTY)
        # The score of the first category, by its own logit and by that of category k.
        expected = torch.zeros_like(grad)
        expected[:, 0] += 1.0
        expected[:, k] -= 1.0
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_frequencies(device):
    """Chi-square of draws from logits, from weights and under a mask, one for each row."""
    p = torch.tensor([0.02, 0.3, 0.0, 0.18, 0.25, 0.05, 0.2], device=device)
    rows = 3000
    mask = torch.tensor([True, True, True, False, True, True, True], device=device)
    for call, (given, probs, allowed) in enumerate(
        ((p.log(), False, None), (p * 3, True, None), (p.clamp_min(0.01).log(), False, mask))
    ):
        index = kernels.draw(
            given.expand(rows, -1), None if allowed is None else allowed.expand(rows, -1), EMPTY,
            form(RANDOM), state=State(pair(device, call)), probs=probs, score=False,
        )[0]  # fmt: skip
        seen = torch.bincount(index, minlength=7).double()
        w = reference.weights(masked(given, allowed).double(), probs)
        expected = w / w.sum() * rows
        assert (seen[expected == 0] == 0).all()
        kept = expected > 0
        statistic = ((seen - expected).square() / expected)[kept].sum()
        # The chi-square tail; a GPU machine has no scipy.
        freedom = (kept.sum() - 1).double()
        assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3


@pytest.mark.parametrize("a", [3, 64, 257, 1001, 2051, 4096])
def test_strided_and_expanded_inputs_are_read_where_they_lie(a, device):
    rows = 2 if a > 200 else 9
    turned = logits_of((a, rows), torch.float32, device).T
    halves = logits_of((rows, 2 * a), torch.float32, device).chunk(2, -1)[1]
    row = logits_of((a,), torch.float32, device).expand(rows, a)
    mask = (torch.rand(a, rows, device=device) < 0.7).T
    for given, sample in itertools.product((turned, halves, row), ((), (2,))):
        size = torch.Size(sample)
        out = []
        for x, allowed in ((given, mask), (given.contiguous(), mask.contiguous())):
            index, hot, score, entropy, _ = kernels.draw(
                x, allowed, size, form(RANDOM, ONE_HOT), state=State(pair(device)), entropy=True
            )
            scored = kernels.score(x, allowed, hot.mT.contiguous().mT, hot=True)[0]
            grad = kernels.backward(None, score, entropy, x, allowed, index, size)
            out.append((index, hot, score, entropy, scored, grad))
        for got, plain in zip(*out, strict=True):
            assert torch.equal(got, plain)


# NumPy, which the interpreter computes with, says so.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_nan_comes_through_and_indices_stay_in_range(device):
    for a in (3, 8, 64, 300, 5003):
        logits = torch.zeros(4, a, device=device)
        logits[1, a // 2] = math.nan
        logits[2, 0] = math.inf
        logits[3] = -math.inf
        index, _, score, entropy, _ = kernels.draw(
            logits, None, EMPTY, form(RANDOM), state=State(pair(device)), entropy=True
        )
        assert ((index >= 0) & (index < a)).all()
        assert score[1].isnan() and entropy[1].isnan() and score[0].isfinite()


# the operators and the distributions ------------------------------------------------------------

CLASSES = (Categorical, OneHotCategorical, MaskedCategorical, MaskedOneHotCategorical)


def build(kind, given, mask=None, probs=False):
    arguments = {"probs" if probs else "logits": given}
    if issubclass(kind, (MaskedCategorical, MaskedOneHotCategorical)):
        arguments["mask"] = mask
    return kind(**arguments)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
def test_distributions_on_both_backends(kind, probs, device):
    """Same draws from one stream, and scores, entropies and gradients that agree."""
    batch, a = (4, 3), 6
    given = torch.rand(*batch, a, device=device) + 0.05
    mask = masks_of(given.shape, device)[1]
    made = {}
    for name in ("triton", "reference"):
        results = made[name] = []
        with backend.using_backend(name):
            stream = CounterStream(SEED, device=device)
            for shape in (EMPTY, torch.Size((2,))):
                leaf = given.clone().requires_grad_()
                # No leaf itself: then a score keeps the entropy.
                dist = build(kind, leaf * 1.0, mask, probs)
                for pathwise in (False, True):
                    value, score = dist._draw(shape, stream, True, pathwise)
                    again = dist.log_prob(value.detach())
                    total = score.sum() + (again * 2).sum() + (dist.entropy() * 3).sum()
                    if value.requires_grad:
                        total = total + (value * torch.arange(a, device=device)).sum()
                    grad = torch.autograd.grad(total, leaf, retain_graph=True)[0]
                    results += [value.detach(), score, again, dist.entropy(), grad]
            for interaction in (
                InteractionType.MODE, InteractionType.MEDIAN, InteractionType.DETERMINISTIC
            ):  # fmt: skip
                results += dist._point(interaction, True)
                results += dist._point(interaction, False)[:1]
            mean = dist._point(InteractionType.MEAN, False)[0]
            grad = torch.autograd.grad(mean.square().sum(), leaf, retain_graph=True)[0]
            results += [mean, grad]
            assert stream.state.tolist() == [SEED, 4]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [Ordinal, OneHotOrdinal, MaskedCategorical])
def test_ordinals_and_index_lists(kind, device):
    scores = torch.randn(5, 6, device=device)
    listed = torch.tensor([0, 3, 5, 3], device=device).expand(5, 4)
    made = {}
    for name in ("triton", "reference"):
        with backend.using_backend(name):
            leaf = scores.clone().requires_grad_()
            dist = (
                MaskedCategorical(logits=leaf, indices=listed, padding_value=5)
                if kind is MaskedCategorical
                else kind(leaf)
            )
            stream = CounterStream(2, device=device)
            value, score = dist.sample_and_log_prob((3,), generator=stream)
            total = score.sum() + dist.log_prob(value).sum() + dist.entropy().sum()
            made[name] = [value, score, dist.mode, *torch.autograd.grad(total, leaf)]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_a_mask_is_handed_on_as_it_is(device, monkeypatch):
    calls = []
    original = kernels.draw_kernel.__class__.__getitem__
    monkeypatch.setattr(
        kernels.draw_kernel.__class__, "__getitem__", lambda k, g: calls.append(k) or original(k, g)
    )
    logits = torch.randn(4, 6, device=device)
    mask = torch.ones(6, dtype=torch.bool, device=device)
    dist = MaskedCategorical(logits=logits, mask=mask, validate_args=False)
    assert dist.batch_shape == (4,) and dist.expand((2, 4)).batch_shape == (2, 4)
    value, _ = dist.sample_and_log_prob()
    assert dist.log_prob(value).shape == (4,)
    assert len(calls) == 2
    fresh = MaskedCategorical(logits=logits, mask=mask, validate_args=False)
    fresh.sample_and_log_prob()
    assert "_given" not in fresh.__dict__
    assert torch.equal(fresh.logits, torch.log_softmax(logits, -1))
    with pytest.raises(AttributeError, match="no_such"):
        _ = fresh.no_such


def test_torchs_seed_rules_where_there_is_no_generator(device):
    dist = Categorical(logits=torch.zeros(64, 9, device=device))
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append((dist.sample(), dist.sample()))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_score_and_entropy_are_one_launch(device, monkeypatch):
    launches = []
    original = kernels.score
    monkeypatch.setattr(kernels, "score", lambda *a, **k: launches.append(1) or original(*a, **k))
    dist = Categorical(logits=torch.randn(5, 6, device=device, requires_grad=True) * 1.0)
    score, entropy = dist.log_prob(torch.zeros(5, device=device)), dist.entropy()
    assert len(launches) == 1
    with backend.using_backend("reference"):
        again = Categorical(logits=dist._given)
        torch.testing.assert_close(score, again.log_prob(torch.zeros(5, device=device)))
        torch.testing.assert_close(entropy, again.entropy())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)], ids=str)
def test_empty(shape, device):
    logits = torch.empty(shape, device=device, requires_grad=True)
    dist = OneHotCategorical(logits=logits)
    value, score = dist.rsample_and_log_prob()
    assert value.shape == shape and score.shape == shape[:-1]
    (score.sum() + dist.entropy().sum() + dist.log_prob(value.detach()).sum()).backward()
    assert logits.grad.shape == shape


def test_operators(device):
    logits = torch.randn(4, 6, device=device, requires_grad=True)
    mask = masks_of(logits.shape, device)[1]
    index = torch.randint(6, (2, 4), device=device)
    hot = torch.nn.functional.one_hot(index, 6)
    for name in ("triton", "reference"):
        with backend.using_backend(name):
            for allowed, sample, value in ((None, [], ONE_HOT), (mask, [2], PROBS)):
                kind = RANDOM if value == ONE_HOT else MEAN
                torch.library.opcheck(
                    torch.ops.fastprob.categorical_draw.default,
                    (logits, allowed, pair(device), sample, False, kind, value, True, True, True),
                )
            torch.library.opcheck(
                torch.ops.fastprob.categorical_score.default,
                (logits, mask, index, False, False, -1e9, True),
            )
            torch.library.opcheck(
                torch.ops.fastprob.categorical_score.default,
                (logits, None, hot, False, True, -math.inf, True),
            )


def test_vmap(device):
    logits = torch.randn(5, 4, 6, device=device)
    mask = masks_of(logits.shape, device)[1]
    value = mask.int().argmax(-1).expand(2, 5, 4)

    def score(x, m, v):
        dist = MaskedCategorical(logits=x, mask=m)
        return dist.log_prob(v), dist.entropy()

    got = torch.vmap(score, in_dims=(0, 0, 1))(logits, mask, value)
    whole = MaskedCategorical(logits=logits, mask=mask)
    torch.testing.assert_close(got[0], whole.log_prob(value).transpose(0, 1))
    torch.testing.assert_close(got[1], whole.entropy())
    draw = torch.vmap(
        lambda x: OneHotCategorical(logits=x).rsample_and_log_prob(), randomness="same"
    )
    value, scores = draw(torch.zeros_like(logits))
    assert torch.equal(value[0], value[3]) and torch.equal(scores[0], scores[3])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: Categorical(logits=x).sample())(logits)


def test_compiled_equals_eager(device):
    logits = torch.randn(5, 6, device=device)
    mask = masks_of(logits.shape, device)[1]

    def call(x):
        plain = OneHotCategorical(logits=x)
        value, score = plain.rsample_and_log_prob()
        dist = MaskedCategorical(logits=x, mask=mask)
        action, scored = dist.sample_and_log_prob()
        return value, score, plain.entropy(), scored, dist.log_prob(action), dist.mode

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaf = logits.clone().requires_grad_()
        out = function(leaf)
        total = sum(o.sum() for o in out if o.requires_grad)
        results += [[*out, *torch.autograd.grad(total, leaf)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Categorical, torch.zeros(4), "does not broadcast"),
        (Categorical, torch.zeros(2, device="meta"), "given a value on"),
        (OneHotCategorical, torch.zeros(2, 4), "3 categories"),
        (MaskedOneHotCategorical, torch.zeros(5, 3), "does not broadcast"),
    ],
)
def test_a_value_that_does_not_fit(kind, value, message, device):
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    dist = build(kind, torch.zeros(2, 3, device=device), mask)
    with pytest.raises(ValueError, match=message):
        dist.log_prob(value if value.is_meta else value.to(device))


def test_more_than_2_to_the_31_elements_are_addressed(device):
    rows, a = 2**31 // 8 + 4, 8
    # An expanded row of a batch that is never held.
    logits = torch.zeros(1, a, device=device, dtype=torch.bfloat16).expand(rows, a)
    if device.type == "cpu":
        read = kernels.parameter(logits, 1, False)
        assert (read.row, read.column) == (0, 1)
        tiles = kernels.tiling(rows, a, 2)
        assert tiles.programs * tiles.own >= rows
        return
    index, _, score, _, _ = kernels.draw(
        logits, None, EMPTY, form(RANDOM), state=State(pair(device))
    )
    assert 0 <= int(index[-1]) < a and math.isclose(score[-1], -math.log(a), rel_tol=1e-2)


@pytest.mark.parametrize("held", [64, kernels.HELD_BACKWARD, kernels.HELD_OF_HOT])
@pytest.mark.parametrize("once", [False, True])
def test_large_batches_leave_few_places_of_their_chunks_empty(held, once):
    for itemsize in (2, 4):
        for a in range(8193, 70_000):
            tiles = kernels.tiling(1 << 20, a, itemsize, held, once=once)
            used = a / (-(-(a + max(tiles.vector - 1, 0)) // tiles.count) * tiles.count)
            assert used >= 7 / 8


def test_tiles_hold_all_rows():
    more = 100, 255, 256, 257, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 8192, 16383, 32768, 50257
    for a in (*range(1, 70), *more):
        flags = itertools.product((1, 5, 1000, 10**5), (2, 4), (False, True), (False, True))
        for rows, itemsize, tight, once in flags:
            held = (kernels.HELD_BACKWARD, kernels.HELD_OF_HOT)[rows == 5] if tight else 64
            tiles = kernels.tiling(rows, a, itemsize, held, tight, once)
            sizes = tiles.rep, tiles.rows, tiles.lanes, tiles.count
            # Ranges of the kernels; lanes of a GATHER and a chunk that is none are no such.
            assert all(n & (n - 1) == 0 for n in sizes if n and not tiles.piece)
            assert tiles.programs * tiles.own >= rows
            assert tiles.own <= tiles.rows
            shifted = a + max(tiles.vector - 1, 0)
            if tiles.chunks:
                assert tiles.chunks * tiles.count >= shifted
                continue
            assert tiles.rep * tiles.lanes >= shifted
            if tiles.piece:
                assert tiles.rep >= tiles.piece and tiles.lanes * tiles.piece >= a
                # What the last lane reads past its row is still in the tile.
                assert tiles.count >= (tiles.own - 1) * a + tiles.lanes * tiles.piece
