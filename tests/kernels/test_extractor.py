"""A NormalParamExtractor in front of the draw: one kernel for both, loc and scale still written."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn

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
from fastprob.specs import Bounded
from tests.kernels.accuracy import DTYPES, Errors

MAPPINGS = ("biased_softplus_1.0", "biased_softplus_0.5_0.05", "softplus", "exp")


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
                leaf, state, True, True, pathwise, list(mapping), [-1.0, 1.0], None, None,
                *interval,
            )  # fmt: skip
            total = sum((o * w.to(dtype)).sum() for o, w in zip(out, weights, strict=False))
            made.append([*out[:3], *torch.autograd.grad(total, leaf)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["triton", "reference"])
def test_operator(kind, device):
    mapping = list(mapping_of(NormalParamExtractor()))
    raw = torch.randn(3, 8, device=device, requires_grad=True)
    state = torch.tensor([4, 5], device=device)
    with backend.using_backend(kind):
        torch.library.opcheck(
            torch.ops.fastprob.extracted_draw.default,
            (
                raw,
                state,
                True,
                True,
                True,
                mapping,
                [-1.0, 1.0],
                None,
                None,
                None,
                None,
                None,
                False,
            ),
        )
        torch.library.opcheck(
            torch.ops.fastprob.extracted_draw.default,
            (raw, state, True, True, True, mapping, None, None, None, [2.0, 0.5], None, None, True),
        )


def policy(
    device, safe=False, name="biased_softplus_1.0", apart=False, dist=IndependentNormal, kwargs=None
):
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
        "in_keys": ["loc", "scale"], "out_keys": ["action"], "return_log_prob": True,
        "distribution_class": dist, "distribution_kwargs": kwargs,
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
    """What was launched: how each draw mapped its scale."""
    found = []
    for module in (normal_kernels, tanh_kernels):

        def draw(*args, original=module.draw, **kwargs):
            found.append(kwargs.get("raw", NO_MAPPING).kind)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "draw", draw)
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("dist", "kwargs", "kind"),
    [
        *((IndependentNormal, None, k) for k in ("random", "mode", "mean", "deterministic")),
        (TanhNormal, None, "random"),
        (TanhNormal, {"low": -2.0, "high": 1.0, "event_dims": 1}, "random"),
        (TanhNormal, {"low": -torch.ones(4), "high": torch.ones(4) * 2}, "random"),
        (TanhNormal, {"safe_tanh": False}, "deterministic"),
    ],
)
def test_a_sequence_runs_both_as_one(apart, safe, dist, kwargs, kind, device, launches):
    kwargs = kwargs and {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
    }
    fused, apart_from_it = (
        policy(device, safe=safe, apart=apart, dist=dist, kwargs=kwargs) for _ in range(2)
    )
    # A hook keeps the extractor on its own.
    apart_from_it[-2].register_forward_hook(lambda *_: None)
    results = []
    for one in (fused, apart_from_it):
        torch.manual_seed(7)
        with set_interaction_type(kind):
            results.append(one(observed(device)))
    assert launches == [1, 0]
    got, expected = results
    assert list(got.keys()) == list(expected.keys())
    for key in list(got.keys()):
        torch.testing.assert_close(got[key], expected[key], rtol=2e-6, atol=2e-6)
    if safe:
        assert got["action"].abs().max() <= 0.5
    grads = [
        torch.autograd.grad(
            (r["sample_log_prob"] + r["action"].sum(-1) + r["scale"].sum(-1)).sum(),
            one.parameters(),
        )
        for r, one in zip(results, (fused, apart_from_it), strict=True)
    ]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


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
