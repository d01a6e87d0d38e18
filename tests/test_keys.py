"""In, out and log-prob keys: every form, every state of the aggregate switch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from tensordict import nn as tdnn
from tensordict.nn import set_composite_lp_aggregate
from torch import distributions as D

import fastprob as fp
from fastprob import ProbabilisticTensorDictModule
from fastprob.keys import composite_switch
from tests._modules import (
    RANDOM,
    assert_same,
    head,
    keys,
    normal_td,
    raises_and_writes_nothing,
    twins,
)

SWITCH = [None, False, True]


@pytest.fixture(autouse=True)
def _nobody_has_set_the_switch():
    assert composite_switch() is None


class switched:
    """The block under a state of `set_composite_lp_aggregate`, None for untouched."""

    def __init__(self, state: bool | None):
        self.context = None if state is None else set_composite_lp_aggregate(state)

    def __enter__(self):
        if self.context is not None:
            self.context.__enter__()

    def __exit__(self, *exc):
        if self.context is not None:
            self.context.__exit__(*exc)


def composite_td(*batch: int) -> TensorDict:
    return TensorDict(
        params=TensorDict(
            a=TensorDict(loc=torch.randn(*batch, 3), scale=torch.rand(*batch, 3) + 0.1),
            b=TensorDict(logits=torch.randn(*batch, 5)),
        ),
        batch_size=batch,
    )


def composite(cls=ProbabilisticTensorDictModule, **kwargs):
    config = {
        "in_keys": ["params"],
        "distribution_class": tdnn.CompositeDistribution,
        "distribution_kwargs": {
            "distribution_map": {"a": D.Normal, "b": D.Categorical},
            "name_map": {"a": ("agent", "move"), "b": "kind"},
        },
        "default_interaction_type": RANDOM,
        "return_log_prob": True,
    }
    config.update(kwargs)
    return cls(**config)


# --- in_keys ---


@pytest.mark.parametrize(
    ("in_keys", "read", "dist_keys"),
    [
        ("loc", ["loc"], ["loc"]),
        (("net", "loc"), [("net", "loc")], [("net", "loc")]),
        ([("net", ("head", "loc"))], [("net", "head", "loc")], [("net", "head", "loc")]),
        (["loc"], ["loc"], ["loc"]),
        (("loc",), ["loc"], ["loc"]),
        ([("net", "loc")], [("net", "loc")], [("net", "loc")]),
        ({"loc": "mu"}, ["mu"], ["loc"]),
        ({"loc": ("net", "mu")}, [("net", "mu")], ["loc"]),
    ],
    ids=str,
)
def test_in_keys_in_every_form(in_keys, read, dist_keys):
    module = head(in_keys=in_keys, distribution_class=D.Normal, distribution_kwargs={"scale": 1.0})
    assert module.in_keys == read
    assert module.dist_params_keys == read
    assert list(module.dist_keys) == dist_keys
    td = TensorDict(batch_size=[3])
    td[read[0]] = loc = torch.randn(3)
    assert torch.equal(module(td)["action"], loc)


def test_in_keys_as_dict_reads_what_it_names():
    td = normal_td(3).rename_key_("loc", "mu").rename_key_("scale", ("net", "sigma"))
    kwargs = {"in_keys": {"scale": ("net", "sigma"), "loc": "mu"}, "return_log_prob": True}
    module = head(**kwargs)
    plain = normal_td(3).update({"loc": td["mu"], "scale": td["net", "sigma"]})
    expected = head(return_log_prob=True)(plain)
    out = module(td)
    assert torch.equal(out["action"], expected["action"])
    assert torch.equal(out["sample_log_prob"], expected["sample_log_prob"])


@pytest.mark.parametrize("in_keys", [["loc", "scale"], [("a", "loc"), ("b", "c", "scale")]])
def test_nested_keys_against_upstream(in_keys):
    source = normal_td(3)
    td = TensorDict(batch_size=[3])
    td[in_keys[0]], td[in_keys[1]] = source["loc"], source["scale"]
    ours, theirs = twins(
        in_keys=in_keys,
        out_keys=[("out", "action")],
        default_interaction_type=RANDOM,
        return_log_prob=True,
        log_prob_key=("out", "lp"),
    )
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append(module(td.copy()))
    assert_same(*results)
    assert keys(results[0])[-2:] == [("out", "action"), ("out", "lp")]


# --- out_keys ---


@pytest.mark.parametrize(
    ("out_keys", "read"),
    [
        ("action", ["action"]),
        (["action"], ["action"]),
        (("agent", "action"), [("agent", "action")]),
        ([("agent", ("one", "action"))], [("agent", "one", "action")]),
    ],
    ids=str,
)
def test_out_keys_in_every_form(out_keys, read):
    module = head(out_keys=out_keys)
    assert module.out_keys == read
    assert module.dist_sample_keys == read
    td = module(normal_td(3))
    assert torch.equal(td[read[0]], td["loc"])
    scored = head(out_keys=out_keys, return_log_prob=True)
    assert scored.out_keys == [*read, "sample_log_prob"]
    assert scored.dist_sample_keys == read


def test_out_keys_left_out():
    ours, theirs = twins(out_keys=None)
    assert ours.out_keys == theirs.out_keys == ["_"]
    td = normal_td(3)
    assert_same(ours(td.copy()), theirs(td.copy()))


@pytest.mark.parametrize("name_map", [None, {"a": ("agent", "move"), "b": "kind"}])
def test_out_keys_of_a_composite_are_inferred(name_map):
    kwargs = {"distribution_map": {"a": D.Normal, "b": D.Categorical}}
    if name_map:
        kwargs["name_map"] = name_map
    config = {"distribution_kwargs": kwargs, "return_log_prob": False}
    ours = composite(**config)
    theirs = composite(tdnn.ProbabilisticTensorDictModule, **config)
    wanted = ["a", "b"] if name_map is None else [("agent", "move"), "kind"]
    assert ours.out_keys == theirs.out_keys == wanted
    out = ours(composite_td(2))
    assert set(wanted) <= set(keys(out))


def test_out_keys_of_a_composite_with_some_names_mapped():
    kwargs = {
        "distribution_map": {"a": D.Normal, "b": D.Categorical},
        "name_map": {"b": "kind"},
    }
    module = composite(distribution_kwargs=kwargs)
    assert module.dist_sample_keys == ["a", "kind"]
    out = module(composite_td(2))
    assert set(module.out_keys) <= set(keys(out))


# --- log-prob keys: one sampled key ---


@pytest.mark.parametrize(
    ("state", "given", "expected"),
    [
        (None, {}, "sample_log_prob"),
        (False, {}, ("agent", "action_log_prob")),
        (True, {}, "sample_log_prob"),
        (None, {"log_prob_key": "lp"}, "lp"),
        (False, {"log_prob_key": "lp"}, "lp"),
        (True, {"log_prob_key": "lp"}, "lp"),
        (None, {"log_prob_key": ("x", "lp")}, ("x", "lp")),
        (None, {"log_prob_keys": ["lp"]}, "lp"),
        (False, {"log_prob_keys": [("x", "lp")]}, ("x", "lp")),
    ],
    ids=str,
)
def test_log_prob_key_of_one_sample(state, given, expected):
    with switched(state):
        kwargs = {"out_keys": [("agent", "action")], "return_log_prob": True, **given}
        ours, theirs = twins(**kwargs)
        assert ours.log_prob_key == expected
        assert ours.log_prob_keys == [expected]
        assert ours.out_keys == [("agent", "action"), expected]
        td = normal_td(3)
        out = ours(td.copy())
        assert keys(out) == ["loc", "scale", ("agent", "action"), expected]
        if state is not None or given:
            # Where someone has decided, it is upstream's rule.
            assert theirs.log_prob_key == expected
            assert_same(out, theirs(td.copy()))


# --- log-prob keys: several sampled keys ---

EACH = [("agent", "move_log_prob"), "kind_log_prob"]


@pytest.mark.parametrize(
    ("state", "given", "each", "total"),
    [
        (None, {}, EACH, "sample_log_prob"),
        (False, {}, EACH, None),
        (True, {}, None, "sample_log_prob"),
        (None, {"log_prob_key": "lp"}, EACH, "lp"),
        (True, {"log_prob_key": "lp"}, None, "lp"),
        (None, {"log_prob_keys": ["x", ("y", "z")]}, ["x", ("y", "z")], "sample_log_prob"),
        (False, {"log_prob_keys": ["x", ("y", "z")]}, ["x", ("y", "z")], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "mode"])
def test_log_prob_keys_of_a_composite(state, given, each, total, kind):
    td = composite_td(2, 3)
    with switched(state), fp.set_interaction_type(kind):
        module = composite(**given)
        lp_keys = [*(each or []), *([total] if total else [])]
        assert module.out_keys == [("agent", "move"), "kind", *lp_keys]
        assert module.log_prob_keys == (each or [total])
        if total:
            assert module.log_prob_key == total
        else:
            with pytest.raises(RuntimeError, match="log_prob_keys"):
                _ = module.log_prob_key
        torch.manual_seed(3)
        out = module(td.copy())
        assert set(module.out_keys) <= set(keys(out))
        # In aggregate mode the components' entries are written next to the sum, as upstream does.
        written = each or EACH
        assert set(keys(out)) == {
            *keys(td),
            ("agent", "move"),
            "kind",
            *written,
            *([total] if total else []),
        }
        a = D.Normal(td["params", "a", "loc"], td["params", "a", "scale"])
        b = D.Categorical(logits=td["params", "b", "logits"])
        torch.testing.assert_close(out[written[0]], a.log_prob(out["agent", "move"]))
        torch.testing.assert_close(out[written[1]], b.log_prob(out["kind"]))
        if total:
            assert out[total].shape == (2, 3)
            torch.testing.assert_close(out[total], out[written[0]].sum(-1) + out[written[1]])
        if state is not None and "log_prob_keys" not in given:
            # Upstream names log_prob_keys among its out-keys, and writes to the default ones.
            theirs = composite(tdnn.ProbabilisticTensorDictModule, **given)
            assert module.log_prob_keys == theirs.log_prob_keys
            torch.manual_seed(3)
            reference = theirs(td.copy())
            assert set(keys(out)) == set(keys(reference))
            assert_same(out.select(*keys(reference)), reference)


@pytest.mark.parametrize("state", SWITCH)
def test_log_prob_method_of_a_composite(state):
    td = composite_td(2)
    with switched(state):
        module = composite()
        td = module(td)
        clean = td.exclude(*EACH, "sample_log_prob")
        result = module.log_prob(clean)
        # A draw is scored without the other categories' log-probabilities, a value from them.
        if state:
            torch.testing.assert_close(result, td["sample_log_prob"])
        else:
            # The entries alone: whoever sums them must not count their sum as one of them.
            assert set(keys(result)) == set(EACH)
            for key in EACH:
                torch.testing.assert_close(result[key], td[key])
        if state is not None:
            other = td.exclude(*EACH, "sample_log_prob")
            reference = composite(tdnn.ProbabilisticTensorDictModule).log_prob(other)
            torch.testing.assert_close(result, reference)
            assert set(keys(clean)) == set(keys(other))
        out = TensorDict(batch_size=[2])
        module.log_prob(td.exclude(*EACH, "sample_log_prob"), out)
        assert set(keys(out)) == {*EACH, *([] if state is False else ["sample_log_prob"])}
        for key in keys(out):
            torch.testing.assert_close(out[key], td[key])


PROGRAM = """
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution
from torch import distributions as D
from fastprob import ProbabilisticTensorDictModule as Head

one = Head(["loc"], ["x"], distribution_class=D.Normal, distribution_kwargs={"scale": 1.0},
           return_log_prob=True)
print(sorted(one(TensorDict(loc=torch.zeros(2), batch_size=2)).keys()))
two = Head({"params": "p"}, distribution_class=CompositeDistribution, return_log_prob=True,
           distribution_kwargs={"distribution_map": {"a": D.Normal, "b": D.Normal}})
part = {"loc": torch.zeros(2), "scale": torch.ones(2)}
td = two(TensorDict(p={"a": part, "b": part}, batch_size=2))
print(sorted(k for k in td.keys() if k != "p"))
print(two.out_keys)
"""


@pytest.mark.parametrize(
    ("value", "one", "two", "out_keys"),
    [
        (
            None,
            ["loc", "sample_log_prob", "x"],
            ["a", "a_log_prob", "b", "b_log_prob", "sample_log_prob"],
            ["a", "b", "a_log_prob", "b_log_prob", "sample_log_prob"],
        ),
        (
            "0",
            ["loc", "x", "x_log_prob"],
            ["a", "a_log_prob", "b", "b_log_prob"],
            ["a", "b", "a_log_prob", "b_log_prob"],
        ),
        (
            "1",
            ["loc", "sample_log_prob", "x"],
            ["a", "a_log_prob", "b", "b_log_prob", "sample_log_prob"],
            ["a", "b", "sample_log_prob"],
        ),
    ],
)
def test_the_environment_variable_is_the_switch(value, one, two, out_keys):
    env = {k: v for k, v in os.environ.items() if k != "COMPOSITE_LP_AGGREGATE"}
    env["PYTHONPATH"] = os.getcwd()
    if value is not None:
        env["COMPOSITE_LP_AGGREGATE"] = value
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [str(one), str(two), str(out_keys)], done.stderr


# --- a change of the switch after construction ---


@pytest.mark.parametrize(("built", "used"), [(False, True), (True, False), (None, True)])
def test_a_changed_switch_raises(built, used):
    with switched(built):
        one, several = head(return_log_prob=True), composite()
    with switched(used):
        for module in (one, several):
            for name in ("out_keys", "log_prob_key", "log_prob_keys"):
                with pytest.raises(RuntimeError, match="set_composite_lp_aggregate") as caught:
                    getattr(module, name)
                assert f"{bool(built)}" in str(caught.value)
                assert f"{bool(used)}" in str(caught.value)
                assert name in str(caught.value)
        for module, td in ((one, normal_td(2)), (several, composite_td(2))):
            with raises_and_writes_nothing(RuntimeError, td, "set_composite_lp_aggregate"):
                module(td)
        td = composite_td(2).update({"kind": torch.zeros(2, dtype=torch.int64)})
        td["agent", "move"] = torch.zeros(2, 3)
        with raises_and_writes_nothing(RuntimeError, td, "set_composite_lp_aggregate"):
            several.log_prob(td)


def test_without_scores_the_switch_does_not_matter():
    module = head()
    with set_composite_lp_aggregate(True):
        assert module.out_keys == ["action"]
        assert "action" in keys(module(normal_td(2)))


# --- arguments that contradict one another ---


def test_log_prob_keys_with_the_sum_switched_on():
    with set_composite_lp_aggregate(True), pytest.raises(RuntimeError) as caught:
        head(log_prob_keys=["lp"])
    assert "log_prob_keys=['lp']" in str(caught.value)
    assert "set_composite_lp_aggregate(False)" in str(caught.value)


def test_log_prob_key_of_several_with_the_sum_switched_off():
    with set_composite_lp_aggregate(False), pytest.raises(RuntimeError) as caught:
        composite(log_prob_key="lp")
    assert "log_prob_key='lp'" in str(caught.value)
    assert "set_composite_lp_aggregate(True)" in str(caught.value)


def test_a_wrong_number_of_log_prob_keys():
    with pytest.raises(ValueError, match=r"2 sampled keys.*got 1: \['lp'\]"):
        composite(log_prob_keys=["lp"])


@pytest.mark.parametrize("in_keys", [3, [3], None], ids=str)
def test_in_keys_of_a_wrong_type(in_keys):
    with pytest.raises((TypeError, ValueError), match="in_keys") as caught:
        head(in_keys=in_keys)
    assert repr(in_keys) in str(caught.value)


def test_in_keys_dict_with_a_keyword_that_is_no_string():
    with pytest.raises(ValueError, match="strings") as caught:
        head(in_keys={("a", "loc"): "x"})
    assert "('a', 'loc')" in str(caught.value)


@pytest.mark.parametrize("out_keys", [3, [3]], ids=str)
def test_out_keys_of_a_wrong_type(out_keys):
    with pytest.raises(TypeError, match="out_keys") as caught:
        head(out_keys=out_keys)
    assert repr(out_keys) in str(caught.value)


def test_a_composite_without_a_map_cannot_name_its_keys():
    with pytest.raises(KeyError, match="distribution_map"):
        composite(distribution_kwargs={})
