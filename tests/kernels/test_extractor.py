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
from fastprob.kernels._launch import NO_MAPPING
from fastprob.ops import extractor as ops
from fastprob.reference import extractor as reference
from fastprob.reference import normal as normal_reference
from fastprob.specs import Bounded
from tests.kernels import tanh_formulas as tanh
from tests.kernels.accuracy import DTYPES, SIZES, Errors

MAPPINGS = ("biased_softplus_1.0", "biased_softplus_0.5_0.05", "softplus", "exp")
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


def made_apart(kind, raw, extractor, used, bounds, clamp, limit):
    """Value, score and scale by plain operations, one after the other; bounds of a TanhNormal."""
    loc, scale = extractor(raw)
    noise = tanh.noise_of(used, loc.shape, loc.dtype, loc.device)
    if bounds is None:
        made = normal_formula(loc, scale, noise, clamp)
    elif kind in (ops.RANDOM, ops.MEDIAN):
        made = tanh.formula(loc, scale, noise, bounds, clamp, limit)
    else:
        made = tanh.point_formula(kind, loc, scale, bounds, clamp, limit)
    return *made, scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_every_kind_of_value(kind, dtype, family, device):
    kind = KINDS[kind]
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    names = itertools.cycle(MAPPINGS)
    limit = torch.tensor(tanh.reference.limit(dtype), dtype=dtype).item()
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
            leaf = raw.clone().requires_grad_()
            got = ops.draw(
                leaf, mapping_of(extractor), CounterStream(tanh.SEED, device), kind=kind,
                bounds=clamp, interval=bounds,
            )  # fmt: skip
            used = tanh.pair(device) if kind == ops.RANDOM else None
            own, truth = raw.clone().requires_grad_(), raw.double().requires_grad_()
            apart = [
                made_apart(kind, x, extractor, used, bounds, clamp, limit) for x in (own, truth)
            ]
            size = (raw[:, :a].double().abs() * 2 + 2).sum(-1)
            for name, scale, *made in zip(
                ("value", f"score {a}", "scale"), (None, size, None), got, *apart, strict=True
            ):
                errors.add(name, *(x.detach() for x in made), scale)
            weights = [torch.randn_like(x) for x in got]
            # Of each result by itself and of all: a gradient that is not there is None in a kernel.
            for wanted in ((True, False, False), (False, True, False), (True, True, True)):
                grads = []
                for made, to in ((got, leaf), (apart[0], own), (apart[1], truth)):
                    total = sum(
                        (x * w.to(x.dtype)).sum()
                        for x, w, use in zip(made, weights, wanted, strict=True)
                        if use
                    )
                    grads += torch.autograd.grad(total, to, retain_graph=True, allow_unused=True)
                errors.add(f"gradient {wanted}", *grads)
    errors.check()


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
                leaf, state, ops.RANDOM, True, pathwise, list(mapping), [-1.0, 1.0], None, None,
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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPERANDS)
def test_operator(back, kind, family, device):
    mapping = list(mapping_of(NormalParamExtractor()))
    raw = torch.randn(3, 8, device=device, requires_grad=True)
    state = torch.tensor([4, 5], device=device) if kind == "random" else None
    for score in (True, False) if kind == "mode" else (True,):
        with backend.using_backend(back):
            torch.library.opcheck(
                torch.ops.fastprob.extracted_draw.default,
                (raw, state, KINDS[kind], score, True, mapping, *OPERANDS[family]),
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPERANDS)
@pytest.mark.parametrize("pathwise", [True, False])
def test_operators_of_both_backends_agree(kind, family, pathwise, device):
    mapping = list(mapping_of(NormalParamExtractor()))
    raw = torch.randn(9, 6, device=device)
    state = torch.tensor([4, 5], device=device) if kind == "random" else None
    made = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            leaf = raw.clone().requires_grad_()
            out = torch.ops.fastprob.extracted_draw(
                leaf, state, KINDS[kind], True, pathwise, mapping, *OPERANDS[family]
            )
            total = sum(o.sin().sum() for o in out[:3])
            made.append([*out, *torch.autograd.grad(total, leaf)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPERANDS)
def test_compiled_and_batched_equal_eager(kind, family, device):
    mapping = mapping_of(NormalParamExtractor())
    interval = tanh.intervals(3, torch.float32, device)[1] if family == "tanh" else None
    raw = torch.randn(4, 9, 6, device=device)

    def call(x):
        return ops.draw(x, mapping, kind=KINDS[kind], interval=interval)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaf = raw.clone().requires_grad_()
        out = function(leaf)
        results.append([*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), leaf)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)
    if kind != "random":
        for got, expected in zip(torch.vmap(call)(raw), results[0], strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


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
def test_a_sequence_of_several_samples(apart, samples, log_prob, dist, kwargs, kind, device):
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


@pytest.mark.parametrize("kind", ["random", "mode", "mean", "deterministic"])
@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize("dist", [IndependentNormal, TanhNormal])
def test_nothing_but_the_network_is_launched_beside_it(kind, log_prob, dist, device, monkeypatch):
    one = policy(device, safe=True, dist=dist, log_prob=log_prob)
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
