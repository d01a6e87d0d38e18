"""fastprob beside upstream on random configurations; see `tests/_fuzz`.

What upstream can do comes out equal, what it raises on gives an error or a right answer. By hand,
for as long as one likes:

    FASTPROB_FUZZ_EXAMPLES=100000 FASTPROB_FUZZ_SEED=1 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given

import fastprob
from tests import _fuzz
from tests._fuzz import MODE, RANDOM, Case, Mismatch, cases, check

EXAMPLES = int(os.environ.get("FASTPROB_FUZZ_EXAMPLES", "2500"))
SEED = int(os.environ.get("FASTPROB_FUZZ_SEED", "0"))


def test_fastprob_does_what_upstream_does():
    outcomes: Counter[str] = Counter()

    # No database and a fixed seed: the same examples in every run.
    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases())
    def search(case: Case) -> None:
        outcomes[check(case)] += 1

    search()
    total = sum(outcomes.values())
    assert total >= EXAMPLES
    # A comparison of errors says little: most examples must have been compared value by value.
    assert outcomes["equal"] > total / 2, outcomes
    assert outcomes["both raise"] < total / 4, outcomes
    assert outcomes["upstream raises"] > 0


# That the comparison can fail ---------------------------------------------------------------------

PLAIN = Case(
    names=("independent",),
    variants=(0,),
    library="tensordict",
    given="upstream",
    batch=(4,),
    event=3,
    dtype=torch.float32,
    even=False,
    grad=False,
    seed=0,
    nested=False,
    mapping=False,
    out_key="action",
    name_map=False,
    default_type=RANDOM,
    global_type=None,
    log_prob=True,
    log_prob_key=None,
    aggregate=None,
    num_samples=None,
    generator=None,
    spec=None,
    safe=False,
    wide=False,
    out=None,
    sequence=False,
    skip=False,
    present=False,
    cache=False,
    positional=False,
)


def edited(edit):
    """A change to a module that edits each of its results."""

    def change(module):
        module.register_forward_hook(lambda _, args, out: edit(out))
        return module

    return change


def nudged(key, amount):
    def edit(td):
        td[key] = td[key] + amount
        return td

    return edited(edit)


def noisy(module):
    module.register_forward_pre_hook(lambda *_: torch.rand(()) and None)
    return module


def replaced_class(module):
    module.default_interaction_type = MODE
    return module


def unprojected(module):
    module._projections = None
    return module


def refusing(module):
    def refuse(*args):
        raise ValueError("no")

    module.register_forward_pre_hook(refuse)
    return module


BROKEN = {
    "value off by ten units": (nudged("action", 1e-5), "units apart"),
    "score without its constant": (nudged("sample_log_prob", 3 * 0.9189), "apart"),
    "score off by a little": (nudged("sample_log_prob", 1e-3), "apart"),
    "dtype": (edited(lambda td: td.set("action", td["action"].double())), "has the dtype"),
    "shape": (
        edited(lambda td: td.set("sample_log_prob", td["sample_log_prob"].unsqueeze(-1))),
        "has the shape",
    ),
    "missing entry": (edited(lambda td: td.exclude("sample_log_prob", inplace=True)), "keys"),
    "further entry": (edited(lambda td: td.set("more", td["action"])), "keys"),
    "lost input": (edited(lambda td: td.exclude("obs", inplace=True)), "keys"),
    "changed input": (edited(lambda td: td.set("loc", td["loc"] + 1)), "loc"),
    "another object": (edited(lambda td: td.clone(False)), "returns"),
    "more noise": (noisy, "units apart"),
    "no noise": (replaced_class, "units apart"),
    "error": (refusing, "raises where upstream does not"),
}


def test_the_plain_case_is_equal():
    assert check(PLAIN) == "equal"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_module_is_caught(name):
    change, said = BROKEN[name]
    with pytest.raises(Mismatch, match=said):
        check(PLAIN, change)


def test_a_missing_projection_is_caught():
    case = dataclasses.replace(PLAIN, library="torchrl", spec="torchrl", safe=True)
    assert check(case) == "equal"
    with pytest.raises(Mismatch, match="units apart"):
        check(case, unprojected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_category_is_caught(dtype):
    case = dataclasses.replace(PLAIN, names=("categorical",), dtype=dtype)
    assert check(case) == "equal"
    with pytest.raises(Mismatch, match="action"):
        check(case, edited(lambda td: td.set("action", (td["action"] + 1) % 3)))


def test_a_generator_that_is_not_advanced_is_caught():
    case = dataclasses.replace(PLAIN, generator="object")
    assert check(case) == "equal"
    with pytest.raises(Mismatch, match=r"units apart|state of the generator"):
        check(case, replaced_class)


@pytest.mark.parametrize(("family", "key"), [("tanh_normal", "mode"), ("categorical", "median")])
def test_a_wrong_answer_where_upstream_raises_is_caught(family, key):
    kind = fastprob.InteractionType(key)
    case = dataclasses.replace(PLAIN, names=(family,), default_type=kind)
    assert check(case) == "upstream raises"
    with pytest.raises(Mismatch, match=key):
        check(case, edited(lambda td: td.set("action", 2 - td["action"])))


def test_an_unclear_error_is_caught():
    case = dataclasses.replace(
        PLAIN, names=("laplace",), default_type=fastprob.InteractionType.MEDIAN
    )
    assert check(case) == "both raise"

    def crash(module):
        module.register_forward_pre_hook(lambda *_: 1 / 0)
        return module

    with pytest.raises(Mismatch, match="no clear error"):
        check(case, crash)


def test_a_search_finds_a_rare_fault():
    """A fault in one family is met among as many examples as CI runs."""

    broken = nudged("action", 0.01)

    def change(module):
        return broken(module) if "concentration1" in module.dist_keys else module

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(cases())
    def search(case: Case) -> None:
        plain = case.out_key == "action" and not (case.sequence or case.with_tensors)
        check(case, change if plain else None)

    with pytest.raises(Mismatch, match="action"):
        search()


def test_every_registered_family_is_among_the_cases():
    """A family that is added to the registry must be added here."""
    built = set()
    for family in _fuzz.FUSED.values():
        for library in ("tensordict", "torchrl"):
            source = _fuzz.Draw(torch.Generator().manual_seed(0), torch.float32, False)
            kind = fastprob.distributions.resolve(family.upstream(library))
            dist = kind(**family.params(source, (2,), 3), **family.kwargs[0])
            built.add(type(fastprob.distributions.recognize(dist)))
    from fastprob.distributions import _registry

    registered = set(_registry._BY_NAME.values()) | set(_registry._SAME.values())
    missing = registered - built - {fastprob.distributions.CompositeDistribution}
    assert not missing
