"""Float64 mathematics of each family: what the correctness gate compares every provider with.

Nothing here is shared with fastprob or with upstream's modules: the formulas go through
``torch.distributions`` in float64, or are written out. The noise is regenerated from the seed with
the one call that eager PyTorch makes for it, so that the reference knows the drawn value before it
was rounded, squashed or projected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        draw: what eager PyTorch draws with a seed, and its log-probability.
        point: the value of a deterministic interaction type.
        score: the log-probability of a value, in float64.
        entropy: the entropy in float64; None where the family has no closed form.
    """

    distribution: str
    params: Callable[[int, int], dict[str, Tensor]]
    draw: Callable[[Params, int], dict[str, Expected]]
    point: Callable[[Params], Expected]
    score: Callable[[Params, Tensor], Tensor]
    entropy: Callable[[Params], Tensor] | None = None


def log_prob_tolerance(log_prob: Tensor) -> Tensor:
    """Allowance for a sum of up to 16 float32 terms of size up to 15, each off by a few EPS."""
    return 1e-4 + 1e-5 * log_prob.abs().nan_to_num(posinf=0.0, neginf=0.0)


def scored(value: Expected, log_prob: Tensor) -> dict[str, Expected]:
    """Bundles a value with its log-probability, with the latter's tolerance."""
    return {"action": value, "log_prob": Expected(log_prob, log_prob_tolerance(log_prob))}


def noise(like: Tensor, seed: int) -> Tensor:
    """Standard normals as eager PyTorch draws them for ``like`` after ``manual_seed(seed)``."""
    torch.manual_seed(seed)
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


def _normal_draw(params: Params, seed: int) -> dict[str, Expected]:
    value = _normal_value(params, noise(params["loc"], seed))
    return scored(value, _normal(params).log_prob(value.value))


NORMAL = Family(
    distribution="IndependentNormal",
    params=_loc_scale,
    draw=_normal_draw,
    point=lambda params: Expected(params["loc"].double(), 0.0),
    score=lambda params, value: _normal(params).log_prob(value),
    entropy=lambda params: _normal(params).entropy(),
)


def projected(draw: dict[str, Expected], low: float, high: float) -> dict[str, Expected]:
    """A draw with the action clamped; the log-probability stays that of the drawn value."""
    action = draw["action"]
    return {**draw, "action": Expected(action.value.clamp(low, high), action.tolerance)}


# ------------------------------------------------------------------------------------ TanhNormal


def _log_slope(x: Tensor) -> Tensor:
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def _tanh_value(x: Tensor) -> Expected:
    # tanh halves nothing: an error of 2 EPS |x| before it is at most 1 EPS after it, and float32
    # tanh itself is good to 2.
    return Expected(x.tanh(), 4 * EPS)


def _tanh_draw(params: Params, seed: int) -> dict[str, Expected]:
    x = _normal_value(params, noise(params["loc"], seed)).value
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


def _categorical_draw(params: Params, seed: int) -> dict[str, Expected]:
    torch.manual_seed(seed)
    index = D.Categorical(logits=params["logits"]).sample()
    # A discrete draw has no rounding: equal, or another draw.
    return scored(Expected(index.double(), 0.0), _categorical_score(params, index))


CATEGORICAL = Family(
    distribution="Categorical",
    params=_logits,
    draw=_categorical_draw,
    point=lambda params: Expected(params["logits"].argmax(-1).double(), 0.0),
    score=_categorical_score,
    entropy=_categorical_entropy,
)


def _one_hot(index: Tensor, params: Params) -> Expected:
    width = params["logits"].shape[-1]
    return Expected(F.one_hot(index.long(), width).double(), 0.0)


def _one_hot_draw(params: Params, seed: int) -> dict[str, Expected]:
    draw = _categorical_draw(params, seed)
    return {**draw, "action": _one_hot(draw["action"].value, params)}


ONE_HOT = Family(
    distribution="OneHotCategorical",
    params=_logits,
    draw=_one_hot_draw,
    point=lambda params: _one_hot(params["logits"].argmax(-1), params),
    score=lambda params, value: _categorical_score(params, value.argmax(-1)),
    entropy=_categorical_entropy,
)


# ----------------------------------------------------------------------------------------- Delta


def _param(rows: int, width: int) -> dict[str, Tensor]:
    return {"param": torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))}


def _delta_score(params: Params, value: Tensor) -> Tensor:
    # Both upstream Deltas score the point itself with +inf.
    same = (value - params["param"].double()).abs().amax(-1) < 1e-6
    return torch.where(same, math.inf, -math.inf).double()


def _delta_draw(params: Params, seed: int) -> dict[str, Expected]:
    value = params["param"].double()
    return scored(Expected(value, 0.0), _delta_score(params, value))


DELTA = Family(
    distribution="Delta",
    params=_param,
    draw=_delta_draw,
    point=lambda params: Expected(params["param"].double(), 0.0),
    score=_delta_score,
)
