"""The modules with the kernels: one launch for a call, and the contract of every call."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from fastprob import (
    ProbabilisticTensorDictModule,
    SafeProbabilisticModule,
    backend,
    set_interaction_type,
)
from fastprob.counter import CounterStream
from fastprob.distributions.normal import IndependentNormal, Normal
from fastprob.kernels import normal as kernels
from fastprob.specs import Bounded, Unbounded

KINDS = ("random", "mode", "median", "mean", "deterministic")


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels' functions that were called."""
    found = []
    for name in ("draw", "score", "draw_backward", "score_backward"):
        original = getattr(kernels, name)

        def call(*args, name=name, original=original, **kwargs):
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, call)
    return found


def head(spec=None, **kwargs):
    kwargs = {
        "in_keys": ["loc", "scale"], "out_keys": ["action"], "return_log_prob": True,
        "distribution_class": IndependentNormal, **kwargs,
    }  # fmt: skip
    if spec is None:
        return ProbabilisticTensorDictModule(**kwargs)
    return SafeProbabilisticModule(spec=spec, safe=True, **kwargs)


def parameters(device, rows=5, a=4):
    return TensorDict(
        {
            "loc": torch.linspace(-2, 2, rows * a, device=device).view(rows, a),
            "scale": torch.linspace(0.1, 1, rows * a, device=device).view(rows, a),
        },
        batch_size=[rows],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spec",
    [
        Bounded(low=-0.5, high=0.5, shape=(4,)),
        Bounded(low=torch.linspace(-1, 0, 4), high=torch.linspace(0.1, 1, 4), shape=(4,)),
    ],
    ids=["numbers", "tensors"],
)
@pytest.mark.parametrize("samples", [None, 3])
def test_a_safe_call_is_one_launch(kind, spec, samples, device, launches):
    module = head(spec.to(device), num_samples=samples)
    plain = head(num_samples=samples)
    with set_interaction_type(kind):
        torch.manual_seed(3)
        got = module(parameters(device))
        count = len(launches)
        torch.manual_seed(3)
        expected = plain(parameters(device))
    # What is repeated or estimated is projected on its own.
    assert count == 1
    assert torch.equal(got["action"], spec.to(device).project(expected["action"]))
    # The score is that of the value before the projection.
    assert torch.equal(got["sample_log_prob"], expected["sample_log_prob"])
    assert list(got.keys()) == list(expected.keys())


def test_the_projection_of_a_call_does_not_stay_with_the_distribution(device):
    held = IndependentNormal(
        torch.full((5, 4), 3.0, device=device), torch.ones(5, 4, device=device)
    )

    class Held(SafeProbabilisticModule):
        def get_dist(self, tensordict):
            return held

    module = Held(
        in_keys=["loc", "scale"], out_keys=["action"], distribution_class=IndependentNormal,
        spec=Bounded(low=-0.5, high=0.5, shape=(4,)), safe=True, return_log_prob=True,
    )  # fmt: skip
    with set_interaction_type("random"):
        assert module(parameters(device))["action"].max() <= 0.5
    assert held.rsample().max() > 0.5


def test_mode_with_nothing_to_score_launches_nothing(device, launches):
    with set_interaction_type("mode"):
        head(return_log_prob=False)(parameters(device))
    assert launches == []


def test_a_spec_that_does_not_fit_is_refused_before_a_launch(device, launches):
    module = head(Bounded(low=-0.5, high=0.5, shape=(3,)))
    with pytest.raises(ValueError, match="does not fit its spec"), set_interaction_type("random"):
        module(parameters(device))
    assert launches == []


def test_an_unbounded_spec_needs_no_projection(device, launches):
    with set_interaction_type("random"):
        out = head(Unbounded(shape=(4,)))(parameters(device))
    assert launches == ["draw"]
    assert out["action"].shape == (5, 4)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(5, 3), "must have shapes that broadcast together"),
        (torch.ones(5, 4, device="meta"), "must be on one device"),
    ],
    ids=["shape", "device"],
)
def test_parameters_that_do_not_fit_are_refused_before_a_launch(scale, message, device, launches):
    scale = scale if scale.is_meta else scale.to(device)
    td = TensorDict({"loc": torch.zeros(5, 4, device=device), "scale": scale}, batch_size=[5])
    module = head(distribution_class=Normal)
    with pytest.raises(ValueError, match=message), set_interaction_type("random"):
        module(td)
    assert launches == []


def test_mixed_dtypes_promote_as_in_the_reference(device):
    td = parameters(device)
    td["scale"] = td["scale"].bfloat16()
    results = []
    for name in ("triton", "reference"):
        with backend.using_backend(name), set_interaction_type("random"):
            results.append(head(generator=CounterStream(2, device))(td.clone()))
    assert results[0]["action"].dtype is results[1]["action"].dtype is torch.float32
    for key in ("action", "sample_log_prob"):
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [None, (2, 3)])
def test_both_backends_draw_the_same_from_a_counter_stream(kind, samples, device):
    results = []
    for name in ("triton", "reference"):
        module = head(generator=CounterStream(6, device), num_samples=samples)
        with backend.using_backend(name), set_interaction_type(kind):
            first = module(parameters(device))
            results.append((first, module(parameters(device)), module))
    for got, expected in zip(results[0][:2], results[1][:2], strict=True):
        for key in ("action", "sample_log_prob"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0]["action"], results[0][1]["action"]) is (kind != "random")


def test_a_fresh_sample_is_never_scored_by_log_prob(device, monkeypatch):
    monkeypatch.setattr(
        IndependentNormal, "log_prob", lambda *_: pytest.fail("log_prob of a fresh sample")
    )
    for kind in KINDS:
        with set_interaction_type(kind):
            head()(parameters(device))


@pytest.mark.parametrize("source", ["none", "int", "generator", "stream", "key"])
@pytest.mark.parametrize("safe", [False, True])
def test_compiled_draws_are_the_eager_ones(source, safe, device):
    spec = Bounded(low=-1.0, high=1.0, shape=(4,), device=device) if safe else None
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        generator = {
            "none": None,
            "int": 5,
            "generator": torch.Generator(device).manual_seed(5),
            "stream": CounterStream(5, device),
            "key": "seed",
        }[source]
        module = head(spec, generator=generator, default_interaction_type="random")
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        loc = torch.zeros(4, device=device)
        seed = torch.tensor(3, device=device)
        td = TensorDict({"loc": loc, "scale": loc + 0.5, "seed": seed})
        results.append([call(td)["action"].clone() for _ in range(2)])
    (first, second), (first_compiled, second_compiled) = results
    assert torch.equal(first, first_compiled) and torch.equal(second, second_compiled)
    assert not torch.equal(first, second)
