"""Whether what fastprob gives is right, where upstream gives nothing to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from tests._fuzz.cases import HALVES, Case
from tests._fuzz.families import GENERAL, INDEXED, MEAN, MEDIAN, MODE, ONE_HOTS, RANDOM
from tests._fuzz.rules import require, role, skipped
from tests._fuzz.sides import UPSTREAM, Seen, options, parameters


def check_alone(case: Case, mine: Seen) -> None:
    """Fails unless what fastprob gives, where upstream raises, is right."""
    if case.with_tensors or skipped(case) or (case.sequence and case.out is not None):
        return
    for _, size, found in mine.calls:
        full = (*case.shape, *case.batch)
        require(size == full or case.out == "empty", "batch size", size, full)
        for index, (key, family) in enumerate(zip(case.sample_keys, case.families, strict=True)):
            value = found[key]
            moment = case.interaction is MEAN and case.names[index] in INDEXED
            event = family.event or (moment and case.names[index] in ONE_HOTS)
            wanted = (*full, case.event) if event else full
            if case.names[index] == "third_party" or not family.event:
                wanted = (*full, case.event) if family.event else full
            require(value.shape == wanted, key, "has the shape", value.shape, wanted)
            check_point(case, index, value.detach())
        if case.log_prob:
            written = [k for k in mine.out_keys if role(case, mine, k)[0] == "score"]
            require(written, "no key of a log-prob among", mine.out_keys)
            for key in written:
                require(key in found, key, "was not written")
            if not case.composite:
                check_score(case, found[case.sample_keys[0]], found[written[0]])


def check_score(case: Case, value: Tensor, score: Tensor) -> None:
    """Fails unless a score is that of the value, by upstream's density in float64."""
    family, name = case.families[0], case.names[0]
    exact = case.interaction is not RANDOM or not name.startswith("tanh")
    if case.safe or case.dtype in HALVES or name in GENERAL or name == "tanh_delta" or not exact:
        return  # scored before the projection, too coarse, upstream's own code, through atanh
    if not value.numel():
        return  # upstream raises on empty batches here
    params, kwargs = doubled(case, 0)
    value, score = value.detach(), score.detach().double()
    if name in INDEXED:
        at = (value.argmax(-1) if name in ONE_HOTS else value.long()).unsqueeze(-1)
        probs = probabilities(name, params, case.event)
        wanted = probs.expand(*case.shape, *probs.shape).gather(-1, at).log().squeeze(-1)
    else:
        wanted = family.upstream("torchrl")(**params, **kwargs).log_prob(value.double())
    require(score.shape == wanted.shape, "the score has the shape", score.shape, wanted.shape)
    # The value was rounded to its dtype: |d log p / dx| * eps, with a slope of up to 100.
    most = (family.score_eps + 300) * case.event * torch.finfo(case.dtype).eps
    same = (score == wanted) | ((score - wanted).abs() <= most)
    require(same.all(), "score", score, wanted)


def doubled(case: Case, index: int) -> tuple[dict, dict]:
    """Parameters and keywords of a family in float64."""
    params = {
        k: v.detach().double() if v.dtype.is_floating_point else v
        for k, v in parameters(case)[index].items()
    }
    kwargs = {
        k: torch.tensor(float(v), dtype=torch.float64) if k in ("low", "high") else v
        for k, v in options(case, UPSTREAM)[index].items()
    }
    return params, kwargs


def check_point(case: Case, index: int, value: Tensor) -> None:
    """Fails unless a deterministic value is what its interaction type says, within chance.

    The truth is 2000 draws of upstream's distribution in float64, and its density.
    """
    family, name = case.families[index], case.names[index]
    if case.safe or case.interaction is RANDOM or not value.numel() or name in GENERAL:
        return
    if case.dtype in HALVES:
        return  # too coarse to tell
    params, kwargs = doubled(case, index)
    value = value[(0,) * len(case.shape)].double()
    if name in INDEXED:
        probs = probabilities(name, params, case.event)
        if case.interaction is MEAN:
            index_mean = (probs * torch.arange(case.event)).sum(-1)
            wanted = probs if name in ONE_HOTS else index_mean
            require((value - wanted).abs().max() < 1e-4, "mean", value, wanted)
            return
        at = (value.argmax(-1) if name in ONE_HOTS else value.long()).unsqueeze(-1)
        if name in ONE_HOTS:
            require((value.sum(-1) == 1).all(), "not one-hot:", value)
        if case.interaction is MEDIAN:
            upto = probs.cumsum(-1)
            before = upto - probs
            right = (upto.gather(-1, at) > 0.4999) & (before.gather(-1, at) < 0.5001)
            require(right.all(), "median", value, probs)
            return
        require((probs.gather(-1, at) >= probs.amax(-1, True) - 1e-6).all(), "mode", value, probs)
        return
    torch.manual_seed(case.seed)
    dist = family.upstream("torchrl")(**params, **kwargs)
    draws = dist.sample((2000,))
    if case.interaction is MEAN:
        error = 6 * draws.std(0) / 2000**0.5 + 1e-4
        require(((draws.mean(0) - value).abs() <= error).all(), "mean", value, draws.mean(0))
    elif case.interaction is MEDIAN:
        # A standard error of 0.011.
        tolerance = 1e-5 * (1 + value.abs())
        below = (draws <= value + tolerance).double().mean(0)
        above = (draws >= value - tolerance).double().mean(0)
        require((below >= 0.43).all() and (above >= 0.43).all(), "median", value, below)
    elif case.interaction is MODE and name not in ("delta", "tanh_delta"):
        best = dist.log_prob(draws[:200]).amax(0)
        require((dist.log_prob(value) >= best - 1e-3).all(), "mode", value, best)


def probabilities(name: str, params: dict[str, Tensor], n: int) -> Tensor:
    """Those of the categories, `[*batch, K]`."""
    if "probs" in params:
        weights = params["probs"]
    else:
        # The ordinals' logits: Tang & Agrawal 2020, equation 4, up to a constant.
        logits = params["scores"].cumsum(-1) if "scores" in params else params["logits"]
        weights = torch.softmax(logits, -1)
    if "mask" in params:
        weights = weights * params["mask"]
    if "indices" in params:
        allowed = torch.zeros_like(weights).scatter_(-1, params["indices"], 1.0)
        weights = weights * allowed
    return weights / weights.sum(-1, keepdim=True)
