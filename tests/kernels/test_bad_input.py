"""Bad input with the kernels: the reference's errors, and nothing launched.

Built from the families, so that a new one is one more row of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastprob import backend, specs
from fastprob import distributions as F
from fastprob.kernels import categorical as any_kernels
from fastprob.specs import projection_for


class Family(NamedTuple):
    """How a distribution is built, and what it is built from and scores.

    Attributes:
        build: from one or two parameters of shape [4, 3].
        parameters: their number.
        masked: whether the second is a boolean mask.
        index: whether values are indices, [4].
    """

    build: Callable[..., Any]
    parameters: int
    masked: bool = False
    index: bool = False


FAMILIES = {
    "Normal": Family(F.Normal, 2),
    "IndependentNormal": Family(F.IndependentNormal, 2),
    "TanhNormal": Family(F.TanhNormal, 2),
    "TruncatedNormal": Family(F.TruncatedNormal, 2),
    "Beta": Family(F.Beta, 2),
    "Bernoulli": Family(lambda x: F.Bernoulli(logits=x), 1),
    "Categorical": Family(lambda x: F.Categorical(logits=x), 1, index=True),
    "OneHotCategorical": Family(lambda x: F.OneHotCategorical(logits=x), 1),
    "MaskedCategorical": Family(
        lambda x, m: F.MaskedCategorical(logits=x, mask=m), 2, masked=True, index=True
    ),
    "MaskedOneHotCategorical": Family(
        lambda x, m: F.MaskedOneHotCategorical(logits=x, mask=m), 2, masked=True
    ),
    "Ordinal": Family(F.Ordinal, 1, index=True),
    "OneHotOrdinal": Family(F.OneHotOrdinal, 1),
    "Delta": Family(F.Delta, 1),
    "TanhDelta": Family(F.TanhDelta, 1),
}
PAIRS = [name for name, family in FAMILIES.items() if family.parameters == 2]
# Those that are drawn with random numbers.
RANDOM = [name for name in FAMILIES if "Delta" not in name]


def test_every_family_is_here():
    built = {
        name for name in F.__all__
        if isinstance(getattr(F, name), type) and issubclass(getattr(F, name), F.Fused)
    }  # fmt: skip
    assert built - {"Fused", "CompositeDistribution"} == set(FAMILIES)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels that were launched."""
    made = []
    kind = type(any_kernels.draw_kernel)
    original = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda k, grid: made.append(k) or original(k, grid))
    return made


def parameters(family: Family, shape: tuple[int, ...] = (4, 3), **kwargs) -> list[Tensor]:
    """Right parameters, but for the last one."""
    made = [torch.full((4, 3), 0.5) for _ in range(family.parameters)]
    dtype = torch.bool if family.masked else torch.float32
    made[-1] = torch.ones(shape, dtype=dtype, **kwargs)
    return made


def draw(dist: Any, **kwargs) -> Any:
    call = dist.rsample_and_log_prob if dist.has_rsample else dist.sample_and_log_prob
    return call(**kwargs)


def errors(call: Callable[[], Any]) -> dict[str, Exception]:
    """What a call raises on each backend."""
    raised = {}
    for name in ("reference", "triton"):
        with backend.using_backend(name), pytest.raises(Exception) as caught:
            call()
        raised[name] = caught.value
    return raised


def same(call: Callable[[], Any], launches: list) -> Exception:
    raised = errors(call)
    got, expected = raised["triton"], raised["reference"]
    assert type(got) is type(expected), f"{got!r} is not {expected!r}"
    assert str(got) == str(expected)
    assert launches == []
    return got


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("call", ["draw", "entropy"])
def test_parameters_that_do_not_go_together(name, call, device, launches):
    family = FAMILIES[name]
    for wrong in ({"shape": (5, 3)}, {"shape": (4, 2)}, {"device": "meta"}):
        given = [p if p.is_meta else p.to(device) for p in parameters(family, **wrong)]

        def use(given=given):
            dist = family.build(*given)
            return draw(dist) if call == "draw" else dist.entropy()

        error = same(use, launches)
        if "shape" in wrong:
            assert isinstance(error, ValueError)
            assert str(wrong["shape"]) in str(error) and "(4, 3)" in str(error)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_parameter_of_another_type(name, launches):
    """A string promotes to no type."""
    rest = parameters(FAMILIES[name])[1:]
    error = same(lambda: draw(FAMILIES[name].build("x", *rest)), launches)
    assert isinstance(error, (TypeError, AttributeError))


@pytest.mark.parametrize("name", RANDOM)
def test_a_generator_that_is_none(name, device, launches):
    dist = FAMILIES[name].build(*(p.to(device) for p in parameters(FAMILIES[name])))
    raised = errors(lambda: draw(dist, generator="x"))
    assert {type(e) for e in raised.values()} == {TypeError}
    assert "generator" in str(raised["triton"])
    assert launches == []


@pytest.mark.parametrize("name", RANDOM)
def test_a_value_that_does_not_fit(name, device, launches):
    """Both backends refuse it; the kernels' words name it, and what it was scored by."""
    family = FAMILIES[name]
    dist = family.build(*(p.to(device) for p in parameters(family)))
    shapes = [(5,)] if family.index else [(5, 3), (4, 2)]
    for shape in shapes:
        raised = errors(lambda shape=shape: dist.log_prob(torch.zeros(shape, device=device)))
        assert isinstance(raised["triton"], ValueError)
        assert str(list(shape)) in str(raised["triton"]) or str(shape) in str(raised["triton"])
    with pytest.raises(ValueError, match="was given a value on meta"):
        dist.log_prob(torch.zeros((4,) if family.index else (4, 3), device="meta"))
    assert launches == []


SPECS = {
    "bounds of each": specs.Bounded(-torch.arange(1.0, 4.0), torch.ones(3), (3,)),
    "one-hot": specs.OneHot(3),
    "masked one-hot": specs.OneHot(3, mask=torch.tensor([True, False, True])),
    "multi-one-hot": specs.MultiOneHot((2, 1)),
    "indices of each": specs.MultiCategorical((2, 3, 4)),
}


@pytest.mark.parametrize("name", SPECS)
def test_an_event_that_does_not_fit_the_spec(name, device, launches):
    projection = projection_for(SPECS[name])
    for value in (torch.zeros(4, 2, device=device), torch.zeros(5, 4, device=device)):
        error = same(lambda value=value: projection(value), launches)
        assert isinstance(error, ValueError)
        assert "cannot project a value of shape" in str(error)


def test_the_comparison_finds_other_words(launches):
    def call():
        raise ValueError(backend.get_backend())

    with pytest.raises(AssertionError):
        same(call, launches)
