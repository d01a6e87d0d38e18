"""Float64 mathematics of each family: what the correctness gate compares every provider with.

Nothing here is shared with fastprob or with upstream's modules: the formulas go through
``torch.distributions`` in float64, or are written out. The noise is regenerated from the seed with
the one call that eager PyTorch makes for it, so that the reference knows the drawn value before it
was rounded, squashed or projected.

A discrete draw, and that of Beta, has no noise to regenerate: there the reference takes what
``torch.distributions`` draws in float32, and scores it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D

Params = Mapping[str, Tensor]
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Expected:
    """A float64 result and how far a float32 computation may be from it."""

    value: Tensor
    tolerance: Tensor | float


@dataclass(frozen=True)
class Family:
    """One distribution: its parameters, and its reference in float64.

    Attributes:
        distribution: the name of the class in ``implementations.Implementation``.
        params: draws parameters of ``[rows, width]``.
        draw: what eager PyTorch draws from torch's generator as it stands, and its log-probability.
        score: the log-probability of a value, in float64.
        point: the value of a deterministic interaction type; None where no case takes one.
        entropy: the entropy in float64; None where the family has no closed form.
        bounds: of the box that a safe module projects onto.
        spec: where that is no box, makes what a safe module projects onto from a namespace of specs
            and the width. A draw is one of its members.
        own_score: whether the log-probability is held to the score of the value that a provider
            returned. For values that float32 finds with less precision than it scores them.
        either_score: whether the score of the value returned is as right as that of the value
            before it was rounded: where a rounding moves the score by more than float32 is off,
            and a library scores the one or the other.
    """

    distribution: str
    params: Callable[[int, int], dict[str, Tensor]]
    draw: Callable[[Params], dict[str, Expected]]
    score: Callable[[Params, Tensor], Tensor]
    point: Callable[[Params], Expected] | None = None
    entropy: Callable[[Params], Tensor] | None = None
    bounds: tuple[float, float] = (-1.0, 1.0)
    spec: Callable[[Any, int], Any] | None = None
    own_score: bool = False
    either_score: bool = False


def log_prob_tolerance(log_prob: Tensor) -> Tensor:
    """Allowance for a sum of up to 16 float32 terms of size up to 15, each off by a few EPS."""
    return 1e-4 + 1e-5 * log_prob.abs().nan_to_num(posinf=0.0, neginf=0.0)


def scored(value: Expected, log_prob: Tensor) -> dict[str, Expected]:
    """Bundles a value with its log-probability, with the latter's tolerance."""
    return {"action": value, "log_prob": Expected(log_prob, log_prob_tolerance(log_prob))}


def noise(like: Tensor) -> Tensor:
    """Standard normals as eager PyTorch draws them for ``like``."""
    return torch.empty_like(like).normal_().double()


def _loc_scale(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    # Means of 0.7 and deviations of 0.1 to 0.6: a third of the draws leave (-1, 1), so that the
    # projection works, and tanh stays below 0.9999, where float32 still tells values apart.
    return {
        "loc": torch.randn(rows, width, generator=generator).mul_(0.7).clamp_(-2, 2),
        "scale": torch.rand(rows, width, generator=generator).mul_(0.5).add_(0.1),
    }


def _double(params: Params) -> dict[str, Tensor]:
    return {name: value.double() for name, value in params.items()}


# ---------------------------------------------------------------------------------------- Normal


def _normal(params: Params) -> D.Distribution:
    return D.Independent(D.Normal(**_double(params), validate_args=False), 1, validate_args=False)


def _normal_value(params: Params, eps: Tensor) -> Expected:
    loc, scale = _double(params).values()
    value = torch.addcmul(loc, eps, scale)
    # Upstream rounds the product and the sum, an addcmul rounds once: two units in the last
    # place of the largest term covers both.
    size = torch.stack([loc.abs(), (eps * scale).abs(), value.abs()]).amax(0)
    return Expected(value, 2 * EPS * size)


def _normal_draw(params: Params) -> dict[str, Expected]:
    value = _normal_value(params, noise(params["loc"]))
    return scored(value, _normal(params).log_prob(value.value))


NORMAL = Family(
    distribution="IndependentNormal",
    params=_loc_scale,
    draw=_normal_draw,
    point=lambda params: Expected(params["loc"].double(), 0.0),
    score=lambda params, value: _normal(params).log_prob(value),
    entropy=lambda params: _normal(params).entropy(),
)


def _plain_normal(params: Params) -> D.Distribution:
    return D.Normal(**_double(params), validate_args=False)


def _plain_normal_draw(params: Params) -> dict[str, Expected]:
    value = _normal_value(params, noise(params["loc"]))
    return scored(value, _plain_normal(params).log_prob(value.value))


PLAIN_NORMAL = Family(
    distribution="Normal",
    params=_loc_scale,
    draw=_plain_normal_draw,
    score=lambda params, value: _plain_normal(params).log_prob(value),
)


def projected(family: Family, draw: dict[str, Expected]) -> dict[str, Expected]:
    """A draw onto the family's spec; the log-probability stays that of the drawn value."""
    if family.spec is not None:
        return draw
    low, high = family.bounds
    action = draw["action"]
    return {**draw, "action": Expected(action.value.clamp(low, high), action.tolerance)}


# ------------------------------------------------------------------------------------ TanhNormal


def _log_slope(x: Tensor) -> Tensor:
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def _tanh_value(x: Tensor) -> Expected:
    # tanh halves nothing: an error of 2 EPS |x| before it is at most 1 EPS after it, and float32
    # tanh itself is good to 2.
    return Expected(x.tanh(), 4 * EPS)


def _tanh_draw(params: Params) -> dict[str, Expected]:
    x = _normal_value(params, noise(params["loc"])).value
    return scored(_tanh_value(x), _normal(params).log_prob(x) - _log_slope(x).sum(-1))


def _tanh_score(params: Params, value: Tensor) -> Tensor:
    x = value.atanh()
    return _normal(params).log_prob(x) - _log_slope(x).sum(-1)


TANH_NORMAL = Family(
    distribution="TanhNormal",
    params=_loc_scale,
    draw=_tanh_draw,
    point=lambda params: _tanh_value(params["loc"].double()),
    score=_tanh_score,
    # TorchRL scores what it has rounded. In 4 of 4M rows of 8 that moves a score by more than the
    # tolerance: at a tanh of 0.9995, the slope of atanh is 1,100.
    either_score=True,
)


# ------------------------------------------------------------------------------- TruncatedNormal

# TorchRL draws from the quantiles between these two, and limits its probabilities to them.
QUANTILES = (1e-6, 1 - 1e-6)


def _inner_loc_scale(rows: int, width: int) -> dict[str, Tensor]:
    # Means between the bounds: outside of them, TorchRL's limits give other numbers.
    params = _loc_scale(rows, width)
    return {**params, "loc": params["loc"].clamp(-0.9, 0.9)}


def _mass_below(params: Params, bound: float) -> Tensor:
    return _plain_normal(params).cdf(torch.tensor(bound, dtype=torch.float64))


def _truncated_score(params: Params, value: Tensor) -> Tensor:
    mass = _mass_below(params, 1.0) - _mass_below(params, -1.0)
    return (_plain_normal(params).log_prob(value) - mass.log()).sum(-1)


def _truncated_draw(params: Params) -> dict[str, Expected]:
    p = torch.empty_like(params["loc"]).uniform_(*QUANTILES).double()
    low, high = _mass_below(params, -1.0), _mass_below(params, 1.0)
    value = _plain_normal(params).icdf(low + p * (high - low))
    # The limits move a probability by 2e-6 at most, and float32 rounds it by less than 1e-6.
    moved = 3e-6 / _plain_normal(params).log_prob(value).exp()
    return scored(Expected(value, 4 * EPS + moved), _truncated_score(params, value))


TRUNCATED_NORMAL = Family(
    distribution="TruncatedNormal",
    params=_inner_loc_scale,
    draw=_truncated_draw,
    score=_truncated_score,
    own_score=True,
)


# ------------------------------------------------------------------------------------------ Beta


def _concentrations(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    # Above 1, as policies have them, so that no draw is rounded to a bound.
    names = ("concentration1", "concentration0")
    return {name: torch.rand(rows, width, generator=generator).mul_(3).add_(1.5) for name in names}


def _beta_score(params: Params, value: Tensor) -> Tensor:
    return D.Beta(**_double(params), validate_args=False).log_prob(value.double())


def _beta_draw(params: Params) -> dict[str, Expected]:
    value = D.Beta(**params).sample()
    return scored(Expected(value.double(), 0.0), _beta_score(params, value))


BETA = Family(
    distribution="Beta",
    params=_concentrations,
    draw=_beta_draw,
    score=_beta_score,
    bounds=(0.0, 1.0),
)


# -------------------------------------------------------------------------------------- discrete


def _logits(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    return {"logits": torch.randn(rows, width, generator=generator)}


def _categorical_score(params: Params, value: Tensor) -> Tensor:
    log_p = params["logits"].double().log_softmax(-1)
    return log_p.gather(-1, value.long().unsqueeze(-1)).squeeze(-1)


def _categorical_entropy(params: Params) -> Tensor:
    log_p = params["logits"].double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _categorical_draw(params: Params) -> dict[str, Expected]:
    index = D.Categorical(logits=params["logits"]).sample()
    # A discrete draw has no rounding: equal, or another draw.
    return scored(Expected(index.double(), 0.0), _categorical_score(params, index))


def _index_spec(specs: Any, width: int) -> Any:
    return specs.Categorical(width)


def _one_hot_spec(specs: Any, width: int) -> Any:
    # int64 as most draws are, and the specs of TorchRL's environments.
    return specs.OneHot(width, dtype=torch.int64)


CATEGORICAL = Family(
    distribution="Categorical",
    params=_logits,
    draw=_categorical_draw,
    point=lambda params: Expected(params["logits"].argmax(-1).double(), 0.0),
    score=_categorical_score,
    entropy=_categorical_entropy,
    spec=_index_spec,
)


def _one_hot(index: Tensor, params: Params) -> Expected:
    width = next(iter(params.values())).shape[-1]
    return Expected(F.one_hot(index.long(), width).double(), 0.0)


def _one_hot_of(family: Family, distribution: str) -> Family:
    """The one-hot form of a family of indices, for random draws."""

    def draw(params: Params) -> dict[str, Expected]:
        drawn = family.draw(params)
        return {**drawn, "action": _one_hot(drawn["action"].value, params)}

    return Family(
        distribution=distribution,
        params=family.params,
        draw=draw,
        score=lambda params, value: family.score(params, value.argmax(-1)),
        entropy=family.entropy,
        spec=_one_hot_spec,
    )


ONE_HOT = _one_hot_of(CATEGORICAL, "OneHotCategorical")


def _masked(params: Params) -> dict[str, Tensor]:
    return {"logits": params["logits"].masked_fill(~params["mask"], -math.inf)}


def _logits_mask(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    logits = torch.randn(rows, width, generator=generator)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    # One action is always left.
    mask[torch.arange(rows), torch.arange(rows) % width] = True
    return {"logits": logits, "mask": mask}


MASKED_CATEGORICAL = Family(
    distribution="MaskedCategorical",
    params=_logits_mask,
    draw=lambda params: _categorical_draw(_masked(params)),
    score=lambda params, value: _categorical_score(_masked(params), value),
    spec=_index_spec,
)
MASKED_ONE_HOT = _one_hot_of(MASKED_CATEGORICAL, "MaskedOneHotCategorical")


def _scores(rows: int, width: int) -> dict[str, Tensor]:
    return {"scores": _logits(rows, width)["logits"]}


def _ordinal(params: Params) -> dict[str, Tensor]:
    """Equation 4 of Tang & Agrawal 2020 as it is written, summed in float64."""
    scores = params["scores"].double()
    up_to = F.logsigmoid(scores).cumsum(-1)
    after = F.logsigmoid(-scores)
    beyond = after.sum(-1, keepdim=True) - after.cumsum(-1)
    return {"logits": up_to + beyond}


def _ordinal_draw(params: Params) -> dict[str, Expected]:
    logits = _ordinal(params)
    index = D.Categorical(logits=logits["logits"].float()).sample()
    return scored(Expected(index.double(), 0.0), _categorical_score(logits, index))


ORDINAL = Family(
    distribution="Ordinal",
    params=_scores,
    draw=_ordinal_draw,
    score=lambda params, value: _categorical_score(_ordinal(params), value),
    spec=_index_spec,
)
ONE_HOT_ORDINAL = _one_hot_of(ORDINAL, "OneHotOrdinal")


def _bernoulli_score(params: Params, value: Tensor) -> Tensor:
    logits = params["logits"].double()
    return value.double() * logits - F.softplus(logits)


def _bernoulli_draw(params: Params) -> dict[str, Expected]:
    value = D.Bernoulli(**params).sample()
    return scored(Expected(value.double(), 0.0), _bernoulli_score(params, value))


BERNOULLI = Family(
    distribution="Bernoulli",
    params=_logits,
    draw=_bernoulli_draw,
    score=_bernoulli_score,
    # Bernoulli draws in the dtype of its parameters.
    spec=lambda specs, width: specs.Binary(width, dtype=torch.float32),
)


# ----------------------------------------------------------------------------------------- Delta


def _param(rows: int, width: int) -> dict[str, Tensor]:
    return {"param": torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))}


def _delta_score(params: Params, value: Tensor) -> Tensor:
    # Both upstream Deltas score the point itself with +inf.
    same = (value - params["param"].double()).abs().amax(-1) < 1e-6
    return torch.where(same, math.inf, -math.inf).double()


def _delta_draw(params: Params) -> dict[str, Expected]:
    value = params["param"].double()
    return scored(Expected(value, 0.0), _delta_score(params, value))


DELTA = Family(
    distribution="Delta",
    params=_param,
    draw=_delta_draw,
    point=lambda params: Expected(params["param"].double(), 0.0),
    score=_delta_score,
)


def _inner_param(rows: int, width: int) -> dict[str, Tensor]:
    # TorchRL scores its own point by way of atanh, which float32 inverts to 1e-6 up to about 1.
    return {"param": _param(rows, width)["param"].clamp(-0.8, 0.8)}


def _tanh_delta_draw(params: Params) -> dict[str, Expected]:
    value = _tanh_value(params["param"].double())
    return scored(value, _tanh_delta_score(params, value.value))


def _tanh_delta_score(params: Params, value: Tensor) -> Tensor:
    return _delta_score(params, value.atanh())


TANH_DELTA = Family(
    distribution="TanhDelta",
    params=_inner_param,
    draw=_tanh_delta_draw,
    score=_tanh_delta_score,
)
