"""CompositeDistribution: its oracle is its components, each tested in a file of its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution as Upstream
from tensordict.nn import set_composite_lp_aggregate
from torch import distributions as D

from fastprob import distributions as F
from fastprob.distributions._base import MEDIAN, MODE, RANDOM
from fastprob.distributions.composite import sum_parts
from tests.distributions._suite import BATCHES

MAP = {
    "cont": D.Normal,
    ("deep", "tanh"): F.TanhNormal,
    "disc": "categorical",
    "hot": F.OneHotCategorical,
    "other": D.Kumaraswamy,
}
KEYS = ["cont", ("deep", "tanh"), "disc", "hot", "other"]


def params(batch=(3,), grad=False):
    def rand(*shape):
        return torch.rand((*batch, *shape), dtype=torch.float64) + 0.5

    td = TensorDict(
        {
            "cont": {"loc": rand(), "scale": rand()},
            "deep": {"tanh": {"loc": rand(2), "scale": rand(2)}},
            "disc": {"logits": rand(4)},
            "hot": {"logits": rand(4)},
            "other": {"concentration1": rand(2), "concentration0": rand(2)},
        },
        batch,
    )
    return td.apply(lambda t: t.requires_grad_()) if grad else td


def parts(td):
    """Each component by itself."""
    return {
        "cont": F.Normal(**td["cont"]),
        ("deep", "tanh"): F.TanhNormal(**td["deep", "tanh"]),
        "disc": F.Categorical(**td["disc"]),
        "hot": F.OneHotCategorical(**td["hot"]),
        "other": D.Kumaraswamy(**td["other"]),
    }


@pytest.mark.parametrize("sample", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_draws_are_those_of_the_components_in_order(batch, sample):
    td = params(batch)
    torch.manual_seed(5)
    drawn = F.CompositeDistribution(td, MAP).sample(torch.Size(sample))
    assert drawn.batch_size == torch.Size(sample) + torch.Size(batch)
    torch.manual_seed(5)
    for key, part in parts(td).items():
        assert torch.equal(drawn[key], part.sample(torch.Size(sample))), key


@pytest.mark.parametrize("what", ["mode", "median"])
def test_points_are_those_of_the_components(what):
    td = params()
    without = {k: v for k, v in MAP.items() if k != "other"}  # torch's Kumaraswamy has no median
    dist = F.CompositeDistribution(td, without)
    for key, part in parts(td).items():
        if key != "other":
            assert torch.equal(getattr(dist, what)[key], getattr(part, what)), key
    with pytest.raises(NotImplementedError, match="Kumaraswamy has no median"):
        _ = F.CompositeDistribution(td, MAP).median


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_log_prob_and_entropy(batch):
    td = params(batch)
    entropic = {k: v for k, v in MAP.items() if k != ("deep", "tanh")}
    drawn = F.CompositeDistribution(td, MAP).sample()
    each = {k: p.log_prob(drawn[k]) for k, p in parts(td).items()}
    entropies = {k: p.entropy() for k, p in parts(td).items() if k in entropic}

    def total(values):
        return sum(v.flatten(len(batch)).sum(-1) if v.ndim > len(batch) else v for v in values)

    with set_composite_lp_aggregate(False):
        found = F.CompositeDistribution(td, MAP).log_prob(drawn)
        for key, wanted in each.items():
            name = (
                (*key[:-1], key[-1] + "_log_prob") if isinstance(key, tuple) else key + "_log_prob"
            )
            torch.testing.assert_close(found[name], wanted)
        found = F.CompositeDistribution(td, entropic).entropy()
        for key, wanted in entropies.items():
            torch.testing.assert_close(found[key + "_entropy"], wanted)
    with set_composite_lp_aggregate(True):
        found = F.CompositeDistribution(td, MAP).log_prob(drawn)
        torch.testing.assert_close(found, total(each.values()))
        found = F.CompositeDistribution(td, entropic).entropy()
        torch.testing.assert_close(found, total(entropies.values()))


@pytest.mark.parametrize("joint", ["rsample_and_log_prob", "sample_and_log_prob"])
def test_joint_draws(joint):
    td = params(grad=True)
    drawn, score = getattr(F.CompositeDistribution(td, MAP), joint)((2,))
    with set_composite_lp_aggregate(True):
        again = F.CompositeDistribution(td, MAP).log_prob(drawn.detach())
    torch.testing.assert_close(score, again, rtol=1e-9, atol=1e-9)
    pathwise = joint == "rsample_and_log_prob"
    for key in KEYS:
        assert drawn[key].requires_grad == (pathwise and key != "disc"), key
    leaves = list(td.values(True, True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(score.sum(), leaves))


def test_take_names_what_it_takes():
    dist = F.CompositeDistribution(params(), {k: v for k, v in MAP.items() if k != "other"})
    for interaction in (RANDOM, MODE, MEDIAN):
        values, scores = dist.take(interaction, torch.Size((2,)), None, True)
        assert set(values) == set(scores) == set(KEYS) - {"other"}
        assert all(v.shape[:2] == (2, 3) for v in (*values.values(), *scores.values()))


def test_name_map_and_extra_keywords():
    td = params()
    dist = F.CompositeDistribution(
        td,
        MAP,
        name_map={"cont": ("action", "cont")},
        extra_kwargs={("deep", "tanh"): {"low": 2.0, "high": 3.0}},
    )
    drawn = dist.sample()
    assert ("action", "cont") in drawn.keys(True) and "cont" not in drawn
    assert (drawn["deep", "tanh"] > 2).all()


def test_nested_composites():
    td = TensorDict({"outer": {"inner": {"loc": torch.zeros(3), "scale": torch.ones(3)}}}, [3])
    kwargs = {"distribution_map": {"inner": D.Normal}}

    def inner(**own):
        return Upstream(TensorDict(own, [3]), **kwargs)

    dist = F.CompositeDistribution(td, {"outer": inner})
    values, scores = dist.take(RANDOM, score=True)
    assert list(values) == [("outer", "inner")] == list(scores)
    wanted = D.Normal(0, 1).log_prob(values["outer", "inner"])
    torch.testing.assert_close(scores["outer", "inner"], wanted)


def test_recognized_where_upstream_built_it():
    td = params()
    with_classes = {"cont": D.Normal, "disc": D.Categorical}
    known = F.recognize(Upstream(td, with_classes))
    assert isinstance(known, F.CompositeDistribution)
    assert isinstance(known["cont"], F.Normal) and isinstance(known["disc"], F.Categorical)
    assert F.recognize(known) is known


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    dist = F.CompositeDistribution(params(), MAP)
    torch.manual_seed(5)
    drawn = dist.sample()
    torch.manual_seed(5)
    assert (copied(dist).sample() == drawn).all()
    assert "cont" in repr(dist)


@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)
def test_empty_batches(batch):
    drawn, score = F.CompositeDistribution(params(batch), MAP).sample_and_log_prob()
    assert drawn.batch_size == score.shape == torch.Size(batch)


def test_missing_and_wrong_parameters():
    td = params().exclude("disc")
    with pytest.raises(KeyError, match=r"parameters of .*disc.*cont"):
        F.CompositeDistribution(td, MAP)
    with pytest.raises(TypeError, match=r"component 'cont' with the keywords \['loc', 'scale'\]"):
        F.CompositeDistribution(td, {"cont": D.Categorical})
    dist = F.CompositeDistribution(params(), MAP)
    with pytest.raises(KeyError, match=r"scores .*disc"):
        dist.score_parts(dist.sample().exclude("disc"))


def test_the_sum_of_one_part_is_a_tensor_of_its_own():
    part = torch.randn(3)
    total = sum_parts([part], 1)
    assert torch.equal(total, part) and total.data_ptr() != part.data_ptr()
