"""What the two sides are meant to differ in, as far as it is the case that says so.

Each difference is named `RULE` in a comment, here and in `compare`, where the values say so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests._fuzz.cases import HALVES, Case, as_tuple
from tests._fuzz.families import (
    BETAS,
    DETERMINISTIC,
    DISCRETE,
    FLIPPED,
    GENERAL,
    MEAN,
    MEDIAN,
    MODE,
    ONE_HOTS,
    RANDOM,
)
from tests._fuzz.sides import Seen, repeats


class Mismatch(AssertionError):
    """The two sides differ, or fastprob is wrong."""


def require(condition: Any, *what: Any) -> None:
    if not condition:
        raise Mismatch(" ".join(map(str, what)))


def is_unfit(case: Case) -> bool:
    """Whether upstream's answer is no answer, or not one to compare with."""
    # RULE: upstream's one-hot classes take logits of one category for logits that have no dimension
    # of categories, and the last dimension of the batch for that.
    if case.event == 1 and case.has("one_hot", "one_hot_probs", "one_hot_ordinal"):
        return True
    # RULE: see `named`. A sequence's tensordict_out gets the out-keys alone, without what upstream
    # has written under other keys.
    if case.composite and case.log_prob_key == "list" and case.sequence and case.out is not None:
        return True
    # RULE: upstream's mean of a one-hot class is a NaN for each index. fastprob's is a vector.
    if case.interaction is MEAN and case.has(*ONE_HOTS) and not skipped(case):
        return True
    # RULE: upstream's scores of a list of actions are those of other rows with three batch
    # dimensions, of which it exchanges two.
    if case.has("masked_list", "masked_one_hot_list") and len(case.batch) + len(case.shape) > 2:
        return True
    # RULE: upstream estimates the means of all components from draws where one has none.
    if case.composite and case.interaction is MEAN and case.has("tanh_normal"):
        return True
    # RULE: `repeats`, where upstream has no call to compare with: a sequence updates tensordict_out
    # from a repeated result, of another batch size.
    return repeats(case) and case.sequence and case.out is not None


def scores_a_mean(case: Case) -> bool:
    return case.interaction is MEAN and case.log_prob and case.has(*DISCRETE) and not skipped(case)


def skipped(case: Case) -> bool:
    """Whether the values are there already and are left as they are."""
    return case.skip and case.present and not case.with_tensors


def same_noise(case: Case) -> bool:
    """Whether both must draw the same amount of noise."""
    if case.skip and case.composite and case.log_prob_key == "list":
        return False  # see `compare`
    if case.safe and case.spec and case.families[0].spec == "one_hot":
        # RULE: TorchRL's projection onto a one-hot spec draws noise, also where nothing is wrong.
        return False
    # RULE: where upstream has no mean, it takes that of 1000 draws; fastprob has it.
    return not (case.interaction is MEAN and case.has("tanh_normal", "tanh_normal_0"))


def takes_noise(case: Case) -> bool:
    """Whether the value may take noise: a random one, or a mean without a closed form."""
    if case.interaction in (MODE, MEDIAN):
        return False
    return case.interaction is RANDOM or case.has(*GENERAL)


def replaced(case: Case, mine: Seen, wanted: dict, found: dict) -> Tensor | None:
    """The rows, `[*sample, *batch]`, where a rule has fastprob give another value than upstream.

    Their scores are those of the other value; `compare_value` says what it may be.
    """
    if skipped(case):
        return None
    rows = None
    for key, theirs in wanted.items():
        what, index = role(case, mine, key)
        if what != "value" or found[key].shape != theirs.shape:
            continue
        name, family = case.names[index], case.families[index]
        if name in FLIPPED and case.dtype in HALVES and case.interaction is RANDOM:
            other = found[key] != theirs
        elif case.interaction in (MODE, DETERMINISTIC) and (name in BETAS or family.discrete):
            other = theirs.isnan() if theirs.is_floating_point() else torch.zeros_like(theirs) > 0
        else:
            continue
        if family.event:
            other = other.any(-1)
        rows = other if rows is None else rows | other
    return rows


def named(case: Case, found: dict) -> dict:
    """Upstream's entries under the keys where they belong."""
    found = dict(found)
    if case.composite and case.log_prob_key == "list":
        # RULE: log_prob_keys of a composite name its entries. Upstream says so in out_keys, and
        # writes "<key>_log_prob" all the same, but for TorchRL's random values.
        for i, key in enumerate(case.sample_keys):
            written = (*as_tuple(key)[:-1], f"{as_tuple(key)[-1]}_log_prob")
            written = written if len(written) > 1 else written[0]
            if written in found:
                found[f"lp{i}"] = found.pop(written)
    return found


def total_key(case: Case) -> Any:
    return case.log_prob_key if case.log_prob_key not in (None, "list") else "sample_log_prob"


def role(case: Case, mine: Seen, key: Any) -> tuple[str, Any]:
    """What an entry is: `"value"` with its family, `"score"`, or `"other"`."""
    if isinstance(key, int):
        key = mine.out_keys[key]
    if key in case.sample_keys:
        return "value", case.sample_keys.index(key)
    last = str(as_tuple(key)[-1])
    if last.endswith("_log_prob") or last in ("lp", "lp0", "lp1", "lp2"):
        return "score", None
    return "other", None
