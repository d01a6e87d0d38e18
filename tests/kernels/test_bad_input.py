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


@pytest.fixture(params=[False, True], ids=["unchecked", "checked"])
def validated(request, monkeypatch):
    """torch's switch for checks, whose own words both backends hand on."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", request.param)
    return request.param


@pytest.fixture
def unchecked(monkeypatch):
    """The switch as TorchRL sets it."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


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
def test_parameters_that_do_not_go_together(name, call, device, launches, validated):
    family = FAMILIES[name]
    for wrong in ({"shape": (5, 3)}, {"shape": (4, 2)}, {"device": "meta"}):
        given = [p if p.is_meta else p.to(device) for p in parameters(family, **wrong)]

        def use(given=given):
            dist = family.build(*given)
            return draw(dist) if call == "draw" else dist.entropy()

        error = same(use, launches)
        if "device" in wrong and (name in ("Normal", "Beta") or family.masked):
            assert isinstance(error, ValueError) and "must be on one device" in str(error)
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
    for wrong in ("x", 1.5, torch.zeros(2)):
        error = same(lambda wrong=wrong: draw(dist, generator=wrong), launches)
        assert isinstance(error, TypeError)
        assert str(error).endswith(f"a torch.Generator or a CounterStream, got {wrong!r}")


@pytest.mark.parametrize("name", RANDOM)
def test_a_value_that_does_not_fit(name, device, launches, validated):
    """Both backends name it, and what it was scored by."""
    family = FAMILIES[name]
    dist = family.build(*(p.to(device) for p in parameters(family)))
    shapes = [(5,), (2, 5), (0,)] if family.index else [(5, 3), (4, 2), (2, 4, 2), (0, 3)]
    for shape in shapes:
        value = torch.zeros(shape, device=device)
        error = same(lambda value=value: dist.log_prob(value), launches)
        assert isinstance(error, ValueError)
        assert str(list(shape)) in str(error) or str(shape) in str(error)
    with pytest.raises(ValueError, match="was given a value on meta"):
        dist.log_prob(torch.zeros((4,) if family.index else (4, 3), device="meta"))
    assert launches == []


@pytest.mark.parametrize("name", RANDOM)
def test_a_value_that_is_no_tensor(name, device, launches, validated):
    family = FAMILIES[name]
    dist = family.build(*(p.to(device) for p in parameters(family)))
    hot = "OneHot" in name
    for wrong in ("x", None, [0.5], 0.5, 1):
        error = same(lambda wrong=wrong: dist.log_prob(wrong), launches)
        if hot:
            assert isinstance(error, AttributeError)
        elif str(error) == "The value argument to log_prob must be a Tensor":
            assert validated and isinstance(error, ValueError)
        else:
            assert isinstance(error, TypeError)
            assert str(error).endswith(f"of real numbers, got {type(wrong).__name__}")


# Those whose reference takes complex values, as torch does.
LENIENT = {"Normal", "IndependentNormal", "TruncatedNormal", "Bernoulli"}
LENIENT |= {name for name, family in FAMILIES.items() if family.index}


@pytest.mark.parametrize("name", RANDOM)
def test_a_value_of_complex_numbers(name, device, launches, unchecked):
    family = FAMILIES[name]
    dist = family.build(*(p.to(device) for p in parameters(family)))
    shape = (4,) if family.index else (4, 3)
    value = torch.zeros(shape, dtype=torch.complex64, device=device)
    if name in LENIENT:
        with pytest.raises(TypeError, match=r"real numbers, got torch\.complex64"):
            dist.log_prob(value)
        assert launches == []
        return
    error = same(lambda: dist.log_prob(value), launches)
    assert isinstance(error, TypeError)
    assert str(error).endswith("real numbers, got torch.complex64")


@pytest.mark.parametrize("name", [n for n in PAIRS if not FAMILIES[n].masked])
def test_complex_parameters_are_no_case_for_the_kernels(name, launches, unchecked):
    family = FAMILIES[name]
    given = parameters(family)
    given[0] = given[0].to(torch.complex64)
    with pytest.raises(RuntimeError, match=r"they compute in fp32|clamp is not supported"):
        draw(family.build(*given))
    assert launches == []


@pytest.mark.parametrize("name", [n for n in RANDOM if n not in ("TanhNormal", "TruncatedNormal")])
def test_values_of_other_types_are_scored_alike(name, device):
    """A float64 value has a float64 score; a boolean one-hot is one."""
    family = FAMILIES[name]
    dist = family.build(*(p.to(device) for p in parameters(family)))
    value = torch.ones(4) if family.index else torch.full((4, 3), 0.25)
    types = [torch.float64, torch.int64]
    if "OneHot" in name or name == "Bernoulli":
        value = torch.eye(3)[[0, 1, 2, 0]]
        types.append(torch.bool)
    elif not family.index:
        types.remove(torch.int64)
    for dtype in types:
        made = []
        for back in ("reference", "triton"):
            with backend.using_backend(back):
                made.append(dist.log_prob(value.to(device, dtype)))
        assert made[0].dtype is made[1].dtype
        torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


def test_a_tanh_normal_scores_values_of_other_types_alike(device):
    dist = F.TanhNormal(torch.zeros(4, 3, device=device), torch.ones(4, 3, device=device))
    for value in (torch.full((4, 3), 0.25, dtype=torch.float64), torch.zeros(4, 3).long()):
        made = []
        for back in ("reference", "triton"):
            with backend.using_backend(back):
                made.append(dist.log_prob(value.to(device)))
        assert made[0].dtype is made[1].dtype
        torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FAMILIES if "Categorical" in n and "Masked" not in n])
def test_no_categories(name, launches):
    """Nothing to choose from is an error of the same type."""
    dist = FAMILIES[name].build(torch.zeros(4, 0))
    for call in (lambda: draw(dist), lambda: dist.mode):
        raised = errors(call)
        assert {type(e) for e in raised.values()} == {IndexError}
    assert "(4, 0)" in str(raised["triton"]) and launches == []


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
