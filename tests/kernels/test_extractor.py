"""A NormalParamExtractor in front of the draw: one kernel for both, loc and scale still written."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprob
from fastprob import backend, set_interaction_type
from fastprob.counter import CounterStream
from fastprob.distributions.normal import IndependentNormal
from fastprob.distributions.tanh_normal import TanhNormal
from fastprob.extraction import mapping_of
from fastprob.kernels import normal as normal_kernels
from fastprob.kernels import tanh_normal as tanh_kernels
from fastprob.kernels._launch import NO_MAPPING, State
from fastprob.kernels._launch import Mapping as Kernels
from fastprob.ops import extractor as ops
from fastprob.ops import normal as normal_ops
from fastprob.ops import tanh_normal as tanh_ops
from fastprob.reference import extractor as reference
from fastprob.reference import normal as normal_reference
from fastprob.specs import Bounded
from tests.kernels import tanh_formulas as tanh
from tests.kernels.accuracy import DTYPES, SIZES, Errors

MAPPINGS = ("biased_softplus_1.0", "biased_softplus_0.5_0.05", "softplus", "exp")
SAMPLES = ((3,), (2, 2))
KINDS = {"random": ops.RANDOM, "median": ops.MEDIAN, "mean": ops.MEAN, "mode": ops.MODE}


@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_its_gradient(name, dtype, device):
    extractor = NormalParamExtractor(name)
    mapping = mapping_of(extractor)
    errors = Errors()
    for a in (1, 3, 8, 33):
        # From deep under the floor to where a softplus is the identity.
        raw = (torch.randn(200 // a, 2 * a, device=device) * 6).clamp(-40, 10).to(dtype)

        def scale_of(x):
            return extractor(x)[1]

        leaf = raw.clone().requires_grad_()
        _, _, scale = ops.draw(leaf, mapping, CounterStream(1, device))
        weight = torch.randn_like(scale)
        (got,) = torch.autograd.grad((scale * weight).sum(), leaf)
        own, truth = raw.clone().requires_grad_(), raw.double().requires_grad_()
        errors.add("scale", *(s.detach() for s in (scale, scale_of(own), scale_of(truth))))
        (mine,) = torch.autograd.grad((scale_of(own) * weight).sum(), own)
        (true,) = torch.autograd.grad((scale_of(truth) * weight.double()).sum(), truth)
        errors.add("gradient", got, mine, true)
    errors.check()


def normal_formula(loc, scale, noise, clamp):
    """Value and score of a Normal, for autograd in any dtype."""
    terms = -0.5 * noise * noise - torch.log(scale) - 0.5 * math.log(2 * math.pi)
    return normal_reference.clamped(loc + noise * scale, *clamp), tanh.total(terms)


def made_apart(kind, raw, extractor, used, bounds, clamp, limit, samples=()):
    """Value, score and scale by plain operations, one after the other; bounds of a TanhNormal."""
    loc, scale = extractor(raw)
    noise = tanh.noise_of(used, (*samples, *loc.shape), loc.dtype, loc.device)
    if bounds is None:
        made = normal_formula(loc, scale, noise, clamp)
    elif kind in (ops.RANDOM, ops.MEDIAN):
        made = tanh.formula(loc, scale, noise, bounds, clamp, limit)
    else:
        made = tanh.point_formula(kind, loc, scale, bounds, clamp, limit)
    return *made, scale


def check_against_float64(errors, kind, extractor, raw, bounds, clamp, samples, weighted):
    """Takes in the errors of value, score, scale and of the gradients by `raw`, one for each of
    `weighted`: which of the three have a weight in what is differentiated.
    """
    dtype, device = raw.dtype, raw.device
    a = raw.shape[-1] // 2
    limit = torch.tensor(tanh.reference.limit(dtype), dtype=dtype).item()
    leaf = raw.clone().requires_grad_()
    got = ops.draw(
        leaf, mapping_of(extractor), CounterStream(tanh.SEED, device), kind=kind,
        shape=torch.Size(samples), bounds=clamp, interval=bounds,
    )  # fmt: skip
    used = tanh.pair(device) if kind == ops.RANDOM else None
    own, truth = raw.clone().requires_grad_(), raw.double().requires_grad_()
    apart = [
        made_apart(kind, x, extractor, used, bounds, clamp, limit, samples) for x in (own, truth)
    ]
    size = (raw[:, :a].double().abs() * 2 + 2).sum(-1)
    for name, scale, *made in zip(
        ("value", f"score {a}", "scale"), (None, size, None), got, *apart, strict=True
    ):
        errors.add(name, *(x.detach() for x in made), scale)
    weights = [torch.randn_like(x) for x in got]
    for wanted in weighted:
        grads = []
        for made, to in ((got, leaf), (apart[0], own), (apart[1], truth)):
            total = sum(
                (x * w.to(x.dtype)).sum()
                for x, w, use in zip(made, weights, wanted, strict=True)
                if use
            )
            grads += torch.autograd.grad(total, to, retain_graph=True, allow_unused=True)
        errors.add(f"gradient {wanted}", *grads)


# Of each result by itself and of all: a gradient that is not there is None in a kernel.
WEIGHTED = ((True, False, False), (False, True, False), (True, True, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_every_kind_of_value(kind, dtype, family, device):
    kind = KINDS[kind]
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    names = itertools.cycle(MAPPINGS)
    for a in SIZES:
        rows = max(1, tanh.ELEMENTS // a)
        for bounds, clamp in zip(
            tanh.intervals(a, dtype, device), tanh.clamps(a, device)[::-1], strict=True
        ):
            bounds = bounds if family == "tanh" else None
            extractor = NormalParamExtractor(next(names))
            raw = torch.randn(rows, 2 * a, device=device).to(dtype)
            if kind == ops.MODE:
                # Where three roots meet one element would outweigh all others.
                loc, scale = extractor(raw)
                meeting = (loc.abs() < 0.5) & ((2 * scale * scale - 1).abs() < 0.5)
                raw[:, :a] = torch.where(meeting, loc + 0.5, loc)
            check_against_float64(errors, kind, extractor, raw, bounds, clamp, (), WEIGHTED)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_several_samples(dtype, family, device):
    errors = Errors()
    # Every pair of a shape and of bounds: 3 is no multiple of 2.
    cases = zip(SIZES, itertools.cycle(SAMPLES), itertools.cycle(range(3)), strict=False)
    for (a, samples, i), name in zip(cases, itertools.cycle(MAPPINGS), strict=False):
        bounds = tanh.intervals(a, dtype, device)[i] if family == "tanh" else None
        clamp = tanh.clamps(a, device)[2 - i]
        raw = torch.randn(max(1, tanh.ELEMENTS // a), 2 * a, device=device).to(dtype)
        check_against_float64(
            errors, ops.RANDOM, NormalParamExtractor(name), raw, bounds, clamp, samples,
            # The scale's gradient alone as well: it must not count once for each sample.
            (*WEIGHTED, (False, False, True)),
        )  # fmt: skip
    errors.check()


# Tiles within the first sample, at its end and behind it; whole chunks of a row, and others.
LARGE = ((700, 3), (40, 33), (150, 17), (300, 8), (5, 257), (2, 1500), (2, 4096))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", ["normal", "tanh"])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_several_samples_are_those_of_a_scale_made_apart(size, family, dtype, device):
    rows, a = size
    samples = torch.Size((2, 1, 2))
    mapping = mapping_of(NormalParamExtractor("exp"))
    interval = tanh.intervals(a, dtype, device)[1] if family == "tanh" else None
    raw = torch.randn(rows, 2 * a, device=device).to(dtype)
    if dtype is not torch.float32:
        # What is drawn with is not rounded, but the scale that is written: to itself here.
        raw[:, a:] = 0.0
    made = ops.draw(
        raw, mapping, CounterStream(tanh.SEED, device), shape=samples, interval=interval
    )
    # It lies in a larger tensor, whose rest must stay as it is.
    guarded = torch.full((rows * 3, a), math.nan, dtype=dtype, device=device)
    scale = made[2]
    given = {
        "state": State(tanh.pair(device)), "raw": Kernels(*mapping), "mapped": guarded[:rows],
    }  # fmt: skip
    halves = raw.chunk(2, -1)
    stream = CounterStream(tanh.SEED, device)
    if interval is None:
        normal_kernels.draw(*halves, samples, 1, **given)
        apart = normal_ops.draw(halves[0], scale, samples, 1, stream)
    else:
        tanh_kernels.draw(*halves, interval, samples, 1, **given)
        apart = tanh_ops.draw(halves[0], scale, interval, samples, 1, stream)
    one = ops.draw(raw, mapping, CounterStream(tanh.SEED, device), interval=interval)
    for got, expected in (
        (made[0], apart[0]), (made[1], apart[1]), (scale, one[2]), (guarded[:rows], one[2]),
    ):  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert guarded[rows:].isnan().all()


@pytest.mark.parametrize("family", ["normal", "tanh"])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_the_scale_has_one_gradient_for_several_samples(size, family, device):
    rows, a = size
    mapping = mapping_of(NormalParamExtractor())
    raw = torch.randn(rows, 2 * a, device=device)
    used = tanh.pair(device)
    # Behind it lies what must not be read.
    weight = torch.full((rows * 3, a), math.nan, device=device)
    weight[:rows] = torch.randn(rows, a, device=device)
    into = torch.empty(3, rows, 2 * a, device=device)
    given = {"raw": Kernels(*mapping), "grad_mapped": weight[:rows], "into": into}
    halves, shape = raw.chunk(2, -1), torch.Size((3,))
    if family == "normal":
        normal_kernels.draw_backward(None, None, None, *halves, used, shape, 1, **given)
    else:
        bounds = tanh.intervals(a, torch.float32, device)[1]
        tanh_kernels.draw_backward(None, None, *halves, bounds, used, shape, 1, **given)
    assert into[1:].count_nonzero() == 0
    slope = reference.slope(raw[:, a:].double(), *mapping)
    expected = torch.cat((torch.zeros(rows, a, device=device), weight[:rows] * slope), -1)
    torch.testing.assert_close(into[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_samples_are_rounded_once(dtype, device):
    raw = torch.randn(40, 12, device=device).to(dtype).requires_grad_()
    mapping = mapping_of(NormalParamExtractor())
    value, _, _ = ops.draw(
        raw, mapping, CounterStream(tanh.SEED, device), shape=torch.Size((2,)), score=False
    )
    noise = tanh.noise_of(tanh.pair(device), value.shape, torch.float64, device)
    # Those of the two samples by the scale cancel but for what rounding these has left. Rounded
    # once more they would be as far off as that.
    weights = torch.stack((noise[1], -noise[0])).to(dtype)
    (got,) = torch.autograd.grad(value, raw, weights)
    true = (weights * noise).sum(0) * reference.slope(raw[:, 6:].double(), *mapping)
    assert true.abs().max() > 2e-4
    torch.testing.assert_close(
        got[:, 6:].double(), true.detach(), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


@pytest.mark.parametrize("way", ["eager", "operator", "reference"])
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_no_samples_leave_the_scale(family, way, device):
    mapping = mapping_of(NormalParamExtractor())
    interval = tanh.intervals(4, torch.float32, device)[1] if family == "tanh" else None
    raw = torch.randn(5, 8, device=device, requires_grad=True)
    expected = reference.scale(raw[:, 4:], *mapping)
    (true,) = torch.autograd.grad(expected.sin().sum(), raw)
    with backend.using_backend("reference" if way == "reference" else "triton"):
        if way == "eager":
            made = ops.draw(raw, mapping, shape=torch.Size((0, 2)), interval=interval)
        else:
            made = torch.ops.fastprob.extracted_draw(
                raw, None, [0, 2], ops.RANDOM, True, True, list(mapping), None, None, None,
                *ops._spread(interval),
            )  # fmt: skip
        value, score, scale = made[:3]
        assert (value.shape, score.shape) == ((0, 2, 5, 4), (0, 2, 5))
        torch.testing.assert_close(scale, expected)
        sums = value.sum() + score.sum()
        (of_none,) = torch.autograd.grad(sums, raw, retain_graph=True)
        (got,) = torch.autograd.grad(scale.sin().sum() + sums, raw)
    torch.testing.assert_close(got, true)
    assert of_none.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_no_score_is_made_where_none_is_wanted(kind, family, device):
    kind = KINDS[kind]
    mapping = mapping_of(NormalParamExtractor())
    bounds = tanh.intervals(5, torch.float32, device)[1] if family == "tanh" else None
    made = []
    for score in (True, False):
        leaf = torch.linspace(-2, 2, 70, device=device).view(7, 10).requires_grad_()
        value, got, scale = ops.draw(
            leaf, mapping, CounterStream(tanh.SEED, device), kind=kind, score=score, interval=bounds
        )
        assert (got is None) is not score
        made.append([value, scale, *torch.autograd.grad((value.sin() + scale).sum(), leaf)])
    for with_score, without in zip(*made, strict=True):
        torch.testing.assert_close(without, with_score, rtol=0, atol=0)


@pytest.mark.parametrize("a", [1, 2, 3, 8, 17, 1500])
@pytest.mark.parametrize("name", MAPPINGS[:1] + MAPPINGS[3:])
@pytest.mark.parametrize("pathwise", [True, False])
@pytest.mark.parametrize("kind", ["normal", "tanh", "tanh of tensors"])
def test_values_scores_and_gradients(a, name, pathwise, kind, device):
    halves, mids = torch.rand(a, device=device) + 0.5, torch.randn(a, device=device)
    interval = {
        "normal": (None, None, None, False),
        "tanh": ([0.9, 0.2], None, None, True),
        "tanh of tensors": (None, halves, mids, False),
    }[kind]
    mapping = mapping_of(NormalParamExtractor(name))
    raw = torch.randn(5, 2 * a, device=device)
    state = torch.tensor([4, 5], device=device)
    weights = [torch.randn(shape, device=device) for shape in ((5, a), (5,), (5, a))]
    made = []
    for served, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        with backend.using_backend(served):
            interval = tuple(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in interval)
            leaf = raw.to(dtype).requires_grad_()
            out = torch.ops.fastprob.extracted_draw(
                leaf, state, [], ops.RANDOM, True, pathwise, list(mapping), [-1.0, 1.0], None, None,
                *interval,
            )  # fmt: skip
            total = sum((o * w.to(dtype)).sum() for o, w in zip(out, weights, strict=False))
            made.append([*out[:3], *torch.autograd.grad(total, leaf)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=3e-5, atol=3e-5)


OPERANDS = {
    # Clamp and interval, as the operator takes them.
    "normal": ([-1.0, 1.0], None, None, None, None, None, False),
    "tanh": (None, None, None, [2.0, 0.5], None, None, True),
}


@pytest.mark.parametrize("back", ["triton", "reference"])
@pytest.mark.parametrize(("kind", "samples"), [*((k, []) for k in KINDS), ("random", [2, 1])])
@pytest.mark.parametrize("family", OPERANDS)
def test_operator(back, kind, samples, family, device):
    mapping = list(mapping_of(NormalParamExtractor()))
    raw = torch.randn(3, 8, device=device, requires_grad=True)
    state = torch.tensor([4, 5], device=device) if kind == "random" else None
    for score in (True, False) if kind == "mode" else (True,):
        with backend.using_backend(back):
            torch.library.opcheck(
                torch.ops.fastprob.extracted_draw.default,
                (raw, state, samples, KINDS[kind], score, True, mapping, *OPERANDS[family]),
            )


@pytest.mark.parametrize("samples", [[], *map(list, SAMPLES)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPERANDS)
@pytest.mark.parametrize("pathwise", [True, False])
def test_operators_of_both_backends_agree(samples, kind, family, pathwise, device):
    mapping = list(mapping_of(NormalParamExtractor()))
    raw = torch.randn(9, 6, device=device)
    state = torch.tensor([4, 5], device=device) if kind == "random" else None
    made = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            leaf = raw.clone().requires_grad_()
            out = torch.ops.fastprob.extracted_draw(
                leaf, state, samples, KINDS[kind], True, pathwise, mapping, *OPERANDS[family]
            )
            total = sum(o.sin().sum() for o in out[:3])
            made.append([*out, *torch.autograd.grad(total, leaf)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("samples", [(), *SAMPLES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPERANDS)
def test_compiled_and_batched_equal_eager(samples, kind, family, device):
    mapping = mapping_of(NormalParamExtractor())
    interval = tanh.intervals(3, torch.float32, device)[1] if family == "tanh" else None
    raw = torch.randn(4, 9, 6, device=device)

    def call(x):
        return ops.draw(x, mapping, kind=KINDS[kind], shape=torch.Size(samples), interval=interval)

    # Of one function a process keeps eight graphs.
    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaf = raw.clone().requires_grad_()
        out = function(leaf)
        results.append([*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), leaf)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)
    torch.manual_seed(2)
    batched = torch.vmap(call, randomness="different")(raw)
    # The batch stands behind the samples, of which the scale has none.
    for got, expected, dims in zip(
        batched, results[0], (len(samples), len(samples), 0), strict=False
    ):
        torch.testing.assert_close(got, expected.movedim(dims, 0), rtol=1e-6, atol=1e-6)


def test_a_batch_of_the_same_noise(device):
    mapping = mapping_of(NormalParamExtractor())
    raw = torch.randn(9, 6, device=device).expand(4, 9, 6)

    def call(x):
        return ops.draw(x, mapping, shape=torch.Size((2, 3)))

    for out, shape in zip(
        torch.vmap(call, randomness="same")(raw), ((2, 3, 9, 3), (2, 3, 9), (9, 3)), strict=True
    ):
        assert out.shape == (4, *shape)
        torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=0)


def policy(
    device, safe=False, name="biased_softplus_1.0", apart=False, dist=IndependentNormal,
    kwargs=None, log_prob=True, samples=None,
):  # fmt: skip
    torch.manual_seed(0)
    layers = [nn.Linear(3, 16, device=device), nn.Tanh(), nn.Linear(16, 8, device=device)]
    if apart:
        modules = [
            TensorDictModule(nn.Sequential(*layers), ["observation"], ["raw"]),
            TensorDictModule(NormalParamExtractor(name), ["raw"], ["loc", "scale"]),
        ]
    else:
        body = nn.Sequential(*layers, NormalParamExtractor(name))
        modules = [TensorDictModule(body, ["observation"], ["loc", "scale"])]
    kwargs = {
        "in_keys": ["loc", "scale"], "out_keys": ["action"], "return_log_prob": log_prob,
        "distribution_class": dist, "distribution_kwargs": kwargs, "num_samples": samples,
    }  # fmt: skip
    if safe:
        spec = Bounded(low=-0.5, high=0.5, shape=(4,))
        head = fastprob.SafeProbabilisticModule(spec=spec, safe=True, **kwargs)
    else:
        head = fastprob.ProbabilisticTensorDictModule(**kwargs)
    return fastprob.ProbabilisticTensorDictSequential(*modules, head)


def observed(device):
    return TensorDict(
        {"observation": torch.linspace(-1, 1, 15, device=device).view(5, 3)}, batch_size=[5]
    )


@pytest.fixture
def launches(monkeypatch):
    """What was launched: how each draw mapped its scale, and each backward pass of one."""
    found = []
    for module in (normal_kernels, tanh_kernels):
        for name in ("draw", "draw_backward"):
            original = getattr(module, name)

            def launch(*args, original=original, **kwargs):
                found.append(kwargs.get("raw", NO_MAPPING).kind)
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, launch)
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize(
    ("dist", "kwargs", "kind"),
    [
        *((IndependentNormal, None, k) for k in ("random", "mode", "mean", "deterministic")),
        *((TanhNormal, None, k) for k in ("random", "mode", "mean", "median", "deterministic")),
        (TanhNormal, {"low": -2.0, "high": 1.0, "event_dims": 1}, "random"),
        (TanhNormal, {"low": -2.0, "high": 1.0}, "mode"),
        (TanhNormal, {"low": -torch.ones(4), "high": torch.ones(4) * 2}, "random"),
        (TanhNormal, {"low": -torch.ones(4), "high": torch.ones(4) * 2}, "mean"),
        (TanhNormal, {"safe_tanh": False}, "deterministic"),
    ],
)
def test_a_sequence_runs_both_as_one(apart, safe, log_prob, dist, kwargs, kind, device, launches):
    kwargs = kwargs and {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
    }
    fused, apart_from_it = (
        policy(device, safe=safe, apart=apart, dist=dist, kwargs=kwargs, log_prob=log_prob)
        for _ in range(2)
    )
    # A hook keeps the extractor on its own.
    apart_from_it[-2].register_forward_hook(lambda *_: None)
    results = []
    for one in (fused, apart_from_it):
        torch.manual_seed(7)
        with set_interaction_type(kind):
            results.append(one(observed(device)))
        if one is fused:
            assert launches == [1]
    got, expected = results
    assert list(got.keys()) == list(expected.keys())
    for key in list(got.keys()):
        torch.testing.assert_close(got[key], expected[key], rtol=2e-6, atol=2e-6)
    if safe:
        assert got["action"].abs().max() <= 0.5
    grads = []
    for r, one in zip(results, (fused, apart_from_it), strict=True):
        total = r["action"].sum(-1) + r["scale"].sum(-1)
        if log_prob:
            total = total + r["sample_log_prob"]
        launches.clear()
        grads.append(torch.autograd.grad(total.sum(), one.parameters()))
        if one is fused:
            assert launches == [1]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("samples", [3, (2, 2), 1])
@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize(
    ("dist", "kwargs", "kind"),
    [
        *((IndependentNormal, None, k) for k in ("random", "mean")),
        *((TanhNormal, None, k) for k in ("random", "mode")),
        (TanhNormal, {"low": -torch.ones(4), "high": torch.ones(4) * 2}, "random"),
    ],
)
def test_a_sequence_of_several_samples(
    apart, samples, log_prob, dist, kwargs, kind, device, launches
):
    kwargs = kwargs and {k: v.to(device) for k, v in kwargs.items()}
    fused, apart_from_it = (
        policy(device, apart=apart, dist=dist, kwargs=kwargs, log_prob=log_prob, samples=samples)
        for _ in range(2)
    )
    apart_from_it[-2].register_forward_hook(lambda *_: None)
    inputs, results, grads = [], [], []
    for one in (fused, apart_from_it):
        torch.manual_seed(7)
        td = observed(device)
        with set_interaction_type(kind):
            out = one(td)
        # loc and scale weigh as much as they are samples.
        total = sum(v.sin().sum() for k, v in out.items() if k != "observation")
        grads.append(torch.autograd.grad(total, one.parameters()))
        if one is fused:
            # One draw and its gradient, both from the raw output.
            assert launches == [1, 1]
        inputs.append(td)
        results.append(out)
    # The input has got loc and scale, and the result has them for each sample.
    for got, expected in (inputs, results):
        assert list(got.keys()) == list(expected.keys())
        assert got.batch_size == expected.batch_size
        for key in list(got.keys()):
            torch.testing.assert_close(got[key], expected[key], rtol=2e-6, atol=2e-6)
    assert {"loc", "scale"} <= set(inputs[0].keys())
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


class _Operations(TorchDispatchMode):
    """The names of ATen's operations that compute something, launches of their own on a GPU."""

    FREE = ("empty", "split", "view", "detach", "alias", "expand", "as_strided", "slice")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith(self.FREE):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("samples", [None, 3, (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["random", "mode", "mean", "deterministic"])
@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize("dist", [IndependentNormal, TanhNormal])
def test_nothing_but_the_network_is_launched_beside_it(
    samples, kind, log_prob, dist, device, monkeypatch
):
    one = policy(device, safe=True, dist=dist, log_prob=log_prob, samples=samples)
    td = observed(device)
    network = one[0].module[:-1]
    with torch.no_grad(), set_interaction_type(kind):
        with _Operations() as alone:
            network(td["observation"])
        # What the interpreter itself does with the tensors is left out.
        for module in (normal_kernels, tanh_kernels):
            monkeypatch.setattr(module, "draw_kernel", _NoKernel())
        with _Operations() as both:
            one(td)
    assert alone.found
    # A CPU's generator gives its pair by a draw, a GPU's as two numbers on the host.
    pair = ["randint"] if kind == "random" and device.type == "cpu" else []
    assert both.found == alone.found + pair


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("samples", [(), *SAMPLES], ids=str)
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_one_sum_is_launched_beside_a_gradient(family, samples, dtype, device, monkeypatch):
    interval = tanh.intervals(4, dtype, device)[1] if family == "tanh" else None
    leaf = torch.randn(5, 8, device=device, dtype=dtype, requires_grad=True)
    mapping = mapping_of(NormalParamExtractor())
    out = ops.draw(leaf, mapping, shape=torch.Size(samples), interval=interval)
    weights = [torch.ones_like(x) for x in out]
    for module in (normal_kernels, tanh_kernels):
        monkeypatch.setattr(module, "draw_backward_kernel", _NoKernel())
    with _Operations() as found:
        (grad,) = torch.autograd.grad(out, leaf, weights)
    assert (grad.shape, grad.dtype) == (leaf.shape, dtype)
    rounding = [] if dtype is torch.float32 else ["_to_copy"]
    assert found.found == (["sum", *rounding] if samples else [])


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *_, **__: None


def test_an_unknown_mapping_or_shape_is_left_to_the_modules(device, launches):
    relu = policy(device, name="relu")
    with set_interaction_type("random"):
        out = relu(observed(device))
    assert launches == [0]
    assert out["scale"].min() >= 1e-4
    # The mean is squashed here, which the kernel does not do.
    squashed = policy(device, dist=TanhNormal, kwargs={"tanh_loc": True})
    with set_interaction_type("random"):
        squashed(observed(device))
    assert launches == [0, 0]
    # A layer that was replaced is run, not the one that was there before.
    one = policy(device)
    one[0].module[-1] = NormalParamExtractor("exp")
    with set_interaction_type("random"):
        out = one(observed(device))
    raw = one[0].module[:-1](observed(device)["observation"])
    torch.testing.assert_close(out["scale"], raw[:, 4:].exp())


def test_the_reference_backend_runs_the_modules(device, launches):
    with backend.using_backend("reference"), set_interaction_type("random"):
        out = policy(device)(observed(device))
    assert launches == []
    assert list(out.keys()) == ["observation", "loc", "scale", "action", "sample_log_prob"]


def test_copies_and_changes_are_followed(device, launches):
    one = policy(device)
    with set_interaction_type("random"):
        one(observed(device))
        other = copy.deepcopy(one)
        with torch.no_grad():
            other[0].module[2].weight.zero_()
            other[0].module[2].bias.zero_()
        out = other(observed(device))
    assert launches == [1, 1]
    assert out["loc"].abs().max() == 0
    torch.testing.assert_close(out["scale"], torch.ones_like(out["scale"]), rtol=1e-6, atol=1e-6)


def test_a_distribution_asked_for_alone_is_the_plain_one(device):
    dist = policy(device).get_dist(observed(device))
    assert type(dist) is IndependentNormal


def test_the_reference_slope_is_that_of_autograd():
    raw = torch.linspace(-20, 10, 301, dtype=torch.float64, requires_grad=True)
    for mapping in ((1, 0.5, 0.01, 1e-4), (1, 0.0, 0.0, 1e-4), (2, 0.0, 0.0, 1e-4)):
        (truth,) = torch.autograd.grad(reference.scale(raw, *mapping).sum(), raw)
        torch.testing.assert_close(reference.slope(raw.detach(), *mapping), truth)
