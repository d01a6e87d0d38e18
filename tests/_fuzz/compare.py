"""The comparison of the two sides of a case.

It fails where they differ; a difference that is meant stands here or in `rules` as a rule, named
`RULE` in a comment, which asks for exactly what fastprob gives instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor

from tests._fuzz.cases import HALVES, Case
from tests._fuzz.families import (
    BETAS,
    DETERMINISTIC,
    DISCRETE,
    FLIPPED,
    GENERAL,
    INDEXED,
    MEAN,
    MODE,
    ONE_HOTS,
    RANDOM,
)
from tests._fuzz.rules import (
    Mismatch,
    is_unfit,
    named,
    replaced,
    require,
    role,
    same_noise,
    scores_a_mean,
    skipped,
    takes_noise,
    total_key,
)
from tests._fuzz.sides import (
    FASTPROB,
    UPSTREAM,
    Seen,
    entries,
    inputs,
    observe,
    parameters,
    repeats,
    settings,
)
from tests._fuzz.truth import check_alone, check_point, doubled, probabilities
from tests._ulp import ulps


def check(case: Case, change: Any = None) -> str:
    """Runs a case on both sides and compares.

    Returns:
        what came of it: `"equal"`, `"both raise"`, `"upstream raises"` or `"ruled out"`.

    Raises:
        Mismatch: if they differ in a way that no rule names.
    """
    library = None
    if case.has("tanh_normal", "tanh_normal_0") and case.log_prob and case.interaction is RANDOM:
        # RULE: a TanhNormal's draw is scored at the value before tanh. TorchRL's module does so as
        # well, tensordict's goes through atanh.
        library = "torchrl"
    theirs = observe(case, UPSTREAM, library)
    mine = observe(case, FASTPROB, change=change)
    if theirs.error is not None or is_unfit(case):
        if mine.error is not None:
            # torch's own distributions may raise what they like, fastprob's code may not.
            foreign = case.has(*GENERAL) and "/torch/distributions/" in raised_in(mine.error)
            require(foreign or isinstance(mine.error, KINDS), "no clear error:", repr(mine.error))
            return "both raise"
        check_alone(case, mine)
        return "upstream raises"
    if scores_a_mean(case):
        # RULE: the mean of a discrete family is none of its values and has no log-probability.
        # Upstream scores it as if it were one, or gives NaN.
        require(isinstance(mine.error, NotImplementedError), "scored a mean:", repr(mine.error))
        require("no log-probability" in str(mine.error), mine.error)
        return "ruled out"
    require(mine.error is None, "raises where upstream does not:", repr(mine.error))
    compare(case, theirs, mine)
    compare_stored(case, theirs, mine)
    return "equal"


def raised_in(error: BaseException) -> str:
    """The file that an error comes from."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else frame.tb_frame.f_code.co_filename.replace("\\", "/")


# What a user can read a message of.
KINDS = (ValueError, TypeError, KeyError, RuntimeError)


def compare(case: Case, theirs: Seen, mine: Seen) -> None:
    """Fails unless both did the same, but for what the rules name."""
    summed = case.composite and case.aggregate is None and case.log_prob
    expected_keys = list(theirs.out_keys)
    if summed:
        # RULE: with several sampled keys and the switch unset, their sum is written too.
        expected_keys.append(total_key(case))
    require(mine.out_keys == expected_keys, "out_keys", mine.out_keys, expected_keys)
    both = list(zip(theirs.calls, mine.calls, strict=True))
    if repeats(case) and case.skip:
        # Upstream's unrepeated result is in the input then, and is there already.
        both = both[:1]
    if not same_noise(case):
        both = both[:1]
    if case.skip and case.composite and case.log_prob_key == "list":
        # Upstream's first call does not write its out-keys, so that its second one is not skipped.
        both = both[:1]
    for (kind, size, found), (my_kind, my_size, my_found) in both:
        found = named(case, found)
        caches = case.cache and case.out is not None and kind != "tensors"
        if caches and not (case.sequence or skipped(case)):
            # RULE: cache_dist writes the parameters next to the sample. Upstream never does, for
            # want of classes with an `update`, or does not get that far.
            shape = torch.Size() if repeats(case) else case.shape
            found |= {k: _expand(v, shape) for k, v in parameters_of(case).items()}
        if repeats(case) and kind != "tensors" and not skipped(case):
            size = (*case.shape, *size)
            found = {k: _expand(v, case.shape) for k, v in found.items()}
            kind = "new"
        elif repeats(case) and not skipped(case):
            found = {k: _expand(v, case.shape) for k, v in found.items()}
        require(my_kind == kind, "returns", my_kind, "and not", kind)
        require(my_size == size, "batch size", my_size, "and not", size)
        if summed and skipped(case):
            found[total_key(case)] = torch.full((*case.batch, 1), 7.0)
        elif summed:
            parts = [found[k] for k in theirs.out_keys[-len(case.sample_keys) :]]
            found[total_key(case)] = sum(_reduced(p, len(case.shape + case.batch)) for p in parts)
        require(
            set(my_found) == set(found), "keys", sorted(map(str, my_found)), sorted(map(str, found))
        )
        other = replaced(case, mine, found, my_found)
        for key, wanted in found.items():
            compare_entry(case, mine, key, my_found[key], wanted, other)
    if not repeats(case):
        left = set(named(case, theirs.left))
        if summed and total_key(case) in mine.calls[0][2]:
            left |= {total_key(case)} & set(mine.left)
        require(set(mine.left) == left, "left", set(mine.left) ^ left)
        if same_noise(case):
            require(torch.equal(mine.global_state, theirs.global_state), "global random state")
        if theirs.state is not None and same_noise(case):
            require(torch.equal(mine.state, theirs.state), "state of the generator")


def parameters_of(case: Case) -> dict[Any, Tensor]:
    """The entries under the in-keys."""
    td, in_keys = inputs(case)
    keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
    return entries(td.select(*keys))


def compare_stored(case: Case, theirs: Seen, mine: Seen) -> None:
    """Compares `log_prob` of the values that upstream has drawn."""
    plain = theirs.result is not None and not (case.sequence or case.skip or case.safe)
    if not (plain and case.interaction is RANDOM and case.out is None):
        return
    if case.has("tanh_normal", "tanh_normal_0", "tanh_delta"):
        return  # through atanh, which magnifies the rounding of the value without a bound
    scores = []
    for side, seen in ((UPSTREAM, theirs), (FASTPROB, mine)):
        with settings(case, side):
            try:
                found = seen.module.log_prob(theirs.result.copy())
            except Exception as error:
                if side == UPSTREAM:
                    return
                raise Mismatch(f"log_prob raises: {error!r}") from error
        found = entries(found) if is_tensor_collection(found) else {"log_prob": found}
        # Upstream's result also has the generator of the input.
        scores.append({k: v for k, v in found.items() if k != "rng"})
    wanted, found = named(case, scores[0]), scores[1]
    require(set(found) == set(wanted), "log_prob gives", set(found), "and not", set(wanted))
    for key, value in wanted.items():
        require(found[key].dtype == value.dtype, "log_prob", key, "dtype", found[key].dtype)
        require(found[key].shape == value.shape, "log_prob", key, "shape", found[key].shape)
        compare_score(case, key, found[key].detach(), value.detach())


def _expand(value: Any, shape: torch.Size) -> Any:
    return value.expand(shape + value.shape) if isinstance(value, Tensor) else value


def _reduced(part: Tensor, ndim: int) -> Tensor:
    return part.flatten(ndim).sum(-1) if part.ndim > ndim else part


def compare_entry(
    case: Case, mine: Seen, key: Any, found: Any, wanted: Any, other: Tensor | None
) -> None:
    what, index = role(case, mine, key)
    if key == "rng" and case.generator in ("key_int", "key_tensor") and not takes_noise(case):
        # RULE: a value that takes no noise leaves the seed as it is. Upstream goes on to the next.
        require((torch.as_tensor(found) == case.seed + 1).all(), "the seed was changed", found)
        return
    if isinstance(wanted, torch.Generator):
        require(isinstance(found, torch.Generator), key, "is", found)
        # The second call's draws count as well, which upstream skips, see `compare`.
        same_calls = same_noise(case) and not (repeats(case) and case.skip)
        same = torch.equal(found.get_state(), wanted.get_state())
        require(same or not same_calls, "state of the generator under the key")
        return
    if not isinstance(wanted, Tensor):
        require(found is wanted or found == wanted, key, "is", found, "and not", wanted)
        return
    require(isinstance(found, Tensor), key, "is", type(found))
    require(found.dtype == wanted.dtype, key, "has the dtype", found.dtype, "not", wanted.dtype)
    require(found.shape == wanted.shape, key, "has the shape", found.shape, "not", wanted.shape)
    if not (
        # RULE: a Delta's draw carries no gradient. Upstream's says that it needs one all the same,
        # as a view does that was taken of a leaf under no_grad.
        (case.has("delta") and case.interaction is RANDOM)
        # RULE: upstream's mean of a Categorical is a constant NaN.
        or (case.interaction is MEAN and case.has(*DISCRETE))
        # RULE: TorchRL's TanhDelta has no mean, so that it is that of draws, without a gradient.
        or (case.interaction is MEAN and case.has("tanh_delta"))
        # RULE: a TanhDelta's log-prob is inf or -inf, and has no gradient to speak of.
        or (case.has("tanh_delta") and what == "score")
    ):
        require(found.requires_grad == wanted.requires_grad, key, "requires_grad", wanted)
    found, wanted = found.detach(), wanted.detach()
    if what == "value" and not skipped(case):
        compare_value(case, index, key, found, wanted)
    elif what == "score" and not skipped(case):
        if other is not None:
            other = other.view(other.shape + (1,) * (found.ndim - other.ndim))
            require(not (found.isnan() & other).any(), key, "has a NaN", found)
            wanted = torch.where(other, found, wanted)
        compare_score(case, key, found, wanted)
    elif what == "value" and case.safe and case.names[index] in ONE_HOTS:
        # RULE: the value that was there is no member of the spec. TorchRL projects it onto one of
        # the categories by chance, fastprob onto that of the largest entry, of equals the first.
        require((found.sum(-1) == 1).all() and found[..., 0].all(), key, found)
    else:
        require(_same(found, wanted), key, "was changed")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def compare_value(case: Case, index: int, key: Any, found: Tensor, wanted: Tensor) -> None:
    family, name = case.families[index], case.names[index]
    if name in FLIPPED and case.dtype in HALVES and case.interaction is RANDOM:
        # RULE: fastprob normalizes logits in one operation, upstream in two with a rounding
        # between, and the ordinals' scores likewise: the probabilities differ by an eps or two, and
        # so does a draw in 200 at most (bfloat16 ordinals; 1 in 800 of other logits).
        flipped = found != wanted
        if name in ONE_HOTS:
            require(case.safe or (found.sum(-1) == 1).all(), key, "is not one-hot", found)
            flipped = flipped.any(-1)
        most = 2 + 0.04 * flipped.numel()
        require(flipped.sum() <= most, key, flipped.sum(), "draws differ", found, wanted)
        return
    if case.interaction is MEAN and name in INDEXED and wanted.isnan().all():
        # RULE: upstream's mean of a Categorical is NaN.
        check_point(case, index, found)
        return
    if case.interaction in (MODE, DETERMINISTIC):
        if case.even and name in ("ordinal", "one_hot_ordinal"):
            # RULE: scores of 0 make all categories equal, and rounding picks one.
            check_point(case, index, found)
            return
        if name in ONE_HOTS and case.safe and (case.even or case.dtype in HALVES):
            # RULE: of several modes one is taken. Upstream's has a one for each, which the
            # projection replaces by a draw.
            require((found.sum(-1) == 1).all(), key, "is not one-hot")
            return
        if name in ONE_HOTS and not case.safe:
            # RULE: of several modes one is taken. Upstream's one-hot mode has a one for each.
            tied = wanted.sum(-1, keepdim=True) > 1
            require((found.sum(-1) == 1).all(), key, "is not one-hot")
            require(((wanted == 1) | (found == 0)).all(), key, found, wanted)
            wanted = torch.where(tied, found, wanted)
        if case.dtype in HALVES and family.spec == "categorical" and not case.safe:
            # RULE: the mode is that of the logits given. Upstream's is that of the normalized ones,
            # which rounding makes equal: by 2 eps of numbers up to 10, so 2 * 10 / 128 at most.
            probs = probabilities(name, doubled(case, index)[0], case.event)
            at = found[(0,) * len(case.shape)].unsqueeze(-1)
            require((probs.gather(-1, at) >= probs.amax(-1, True) * 0.85).all(), key, found)
            return
        if family.discrete:
            # RULE: of two equally probable values 0 is taken, and logits decide what is equally
            # probable. Upstream's mode is NaN, also where the sigmoid was rounded to 1/2.
            above = torch.zeros_like(wanted)
            if "logits" in parameters(case)[index]:
                above = (parameters(case)[index]["logits"] > 0).to(wanted.dtype)
            right = (found == above) | ~wanted.isnan()
            require(right.all(), key, found, wanted)
            wanted = torch.where(wanted.isnan(), found, wanted)
    if name in BETAS and case.interaction is MODE:
        # RULE: with no concentration above 1 the mode is the end where the density grows faster,
        # and 1/2 where it is flat. Upstream says 1 of any pair below 1, and NaN where one of them
        # is 1, which is common in half precision.
        params = parameters(case)[index]
        a, b = params["concentration1"], params["concentration0"]
        end = torch.where((a == 1) & (b == 1), 0.5, (a >= b).to(wanted.dtype)).to(wanted.dtype)
        if case.safe and not case.wide:
            end = end.clamp_max(0.3)
        wanted = torch.where((a <= 1) & (b <= 1), end, wanted)
    if name == "truncated_normal" and case.interaction is MODE:
        # RULE: a mode at a bound is the bound. Upstream stays 1e-6 inside.
        wanted = torch.where((found - wanted).abs() <= 1.1e-6, found, wanted)
    if name in ("tanh_normal", "tanh_normal_0") and case.interaction is MEAN:
        # RULE: the mean of a TanhNormal is the true one. Upstream's is that of 1000 draws, with a
        # standard error of at most half the width / sqrt(1000).
        wide = 2.5 if family.kwargs[case.variants[index]] else 2.0
        require(((found - wanted).abs() <= 6 * wide / 2 / 1000**0.5).all(), key, found, wanted)
        return
    if not wanted.dtype.is_floating_point or family.discrete or family.value_ulps == 0:
        require(_same(found, wanted), key, found, wanted)
        return
    size = torch.full_like(wanted, 3.0 if family.spec == "bounded" else 1.0)
    distance = ulps(found, wanted, size)
    worst = distance.max().item() if distance.numel() else 0.0
    require(worst <= family.value_ulps, key, f"{worst:.1f} units apart", found, wanted)


def compare_score(case: Case, key: Any, found: Tensor, wanted: Tensor) -> None:
    if case.has("tanh_normal", "tanh_normal_0") and case.interaction is MEAN:
        return  # RULE: the score of another mean, see `compare_value`
    if case.has("tanh_delta"):
        # RULE: the log-prob of a TanhDelta's own point is inf. Upstream inverts tanh on the point,
        # and does not always find it again.
        found = torch.where((found == math.inf) & (wanted == -math.inf), wanted, found)
    most = sum(f.score_eps * case.event for f in case.families) * torch.finfo(wanted.dtype).eps
    if case.composite and key == total_key(case):
        # RULE: the sum is that of the components' sums. Upstream's is over all elements at once, of
        # up to 20 in size, in another order.
        most = max(most, 20 * case.event * len(case.names) * torch.finfo(wanted.dtype).eps)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    distance = (found.double() - wanted.double()).abs()[~same]
    worst = distance.max().item() if distance.numel() else 0.0
    require(worst <= most, key, f"{worst:.3g} apart, {most:.3g} allowed", found, wanted)
