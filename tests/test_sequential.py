"""ProbabilisticTensorDictSequential: structure, calls, distributions, and edits."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import weakref

import pytest
import torch
import torchrl.data as rl
import torchrl.modules as rlm
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict import nn as tdnn
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing
from torch import distributions as D
from torch import nn

import fastprob as fp
from fastprob import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    set_interaction_type,
)
from tests._modules import (
    MODE,
    RANDOM,
    assert_same,
    entries,
    head,
    indep_normal,
    keys,
    normal_td,
    unchanged,
)

LIBRARIES = (fp, tdnn)


class Twice(nn.Module):
    """Parameters of a Normal, picklable."""

    def forward(self, x):
        return 2 * x, x.exp()


def network():
    return TensorDictModule(Twice(), ["obs"], ["loc", "scale"])


def parts(library=fp, **kwargs):
    config = {"return_log_prob": True, "log_prob_key": "lp", **kwargs}
    return network(), head(library.ProbabilisticTensorDictModule, **config)


def sequence(library=fp, *, seq=None, **kwargs):
    return library.ProbabilisticTensorDictSequential(*parts(library, **kwargs), **(seq or {}))


def obs_td(*batch, **more):
    return TensorDict(obs=torch.randn(*batch, 4), batch_size=batch).update(more)


def normal_head(library, source, out, **kwargs):
    config = {
        "distribution_class": D.Normal,
        "distribution_kwargs": {"scale": 1.0},
        "return_log_prob": True,
        "log_prob_key": f"{out}_lp",
        **kwargs,
    }
    return library.ProbabilisticTensorDictModule(in_keys={"loc": source}, out_keys=[out], **config)


def two_heads(library=fp, **kwargs):
    """x ~ N(obs, 1), y ~ N(x, 1)."""
    return library.ProbabilisticTensorDictSequential(
        normal_head(library, "obs", "x"), normal_head(library, "x", "y"), **kwargs
    )


def both(build, td, call=lambda seq, td: seq(td), seed=1):
    """What the call gives for fastprob's sequence and for upstream's."""
    results = []
    for library in LIBRARIES:
        torch.manual_seed(seed)
        results.append(call(build(library), td.copy()))
    return results


# --- structure ---


def test_classes_and_keys():
    seq, theirs = sequence(), sequence(tdnn)
    assert isinstance(seq, tdnn.ProbabilisticTensorDictSequential)
    assert isinstance(seq, TensorDictSequential)
    for name in (
        "in_keys",
        "out_keys",
        "dist_params_keys",
        "dist_sample_keys",
        "log_prob_keys",
        "num_samples",
        "return_composite",
        "partial_tolerant",
        "inplace",
    ):
        assert getattr(seq, name) == getattr(theirs, name), name
    assert seq.default_interaction_type is MODE
    # Upstream's raises an AttributeError.
    assert seq.log_prob_key == "lp"
    assert isinstance(seq.det_part, TensorDictSequential)
    assert seq.det_part.out_keys == ["loc", "scale"]
    assert list(seq.state_dict()) == list(theirs.state_dict())


FORMS = {
    "modules": lambda net, last: (net, last),
    "list": lambda net, last: ([net, last],),
    "OrderedDict": lambda net, last: (collections.OrderedDict(net=net, head=last),),
    "dict": lambda net, last: ({"net": net, "head": last},),
}


@pytest.mark.parametrize("form", FORMS)
def test_construction_in_every_form(form):
    td = obs_td(3)
    results = []
    for library in LIBRARIES:
        seq = library.ProbabilisticTensorDictSequential(*FORMS[form](*parts(library)))
        results.append((seq, seq(td.copy())))
        assert seq.get_dist(td.copy()).batch_shape == (3,)
        assert seq.out_keys == ["loc", "scale", "action", "lp"]
        assert seq.det_part.out_keys == ["loc", "scale"]
    (ours, out), (theirs, expected) = results
    assert_same(out, expected)
    assert type(ours.module) is type(theirs.module)
    names = ["net", "head"] if "dict" in form.lower() else ["0", "1"]
    assert list(ours.module._modules) == names
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_callable_in_the_sequence():
    _, last = parts()
    seq = ProbabilisticTensorDictSequential(
        network(), lambda td: td.update({"loc": td["loc"] + 1}), last
    )
    td = obs_td(3)
    assert torch.equal(seq(td)["action"], 2 * td["obs"] + 1)


def test_a_sequence_of_a_head_alone():
    td = normal_td(3)
    for library in LIBRARIES:
        seq = library.ProbabilisticTensorDictSequential(head(library.ProbabilisticTensorDictModule))
        assert torch.equal(seq(td.copy())["action"], td["loc"])
        assert seq.get_dist(td.copy()).batch_shape == (3,)


def test_nested_sequences():
    # Upstream cannot call them: the inner sequence does not take what the outer one hands on.
    td = TensorDict(raw=torch.randn(3, 4), batch_size=[3])
    pre = TensorDictModule(lambda x: x + 1, ["raw"], ["obs"])
    expected = sequence(tdnn)(TensorDict(obs=td["raw"] + 1, batch_size=[3]))
    for inner in (sequence(), sequence(tdnn)):
        seq = ProbabilisticTensorDictSequential(pre, inner)
        out = seq(td.copy())
        assert keys(out) == ["raw", "obs", "loc", "scale", "action", "lp"]
        assert_same(out.exclude("raw"), expected)
        torch.testing.assert_close(seq.get_dist(td.copy()).mean, expected["loc"])
        torch.testing.assert_close(seq.log_prob(out.copy()), expected["lp"])
    # A value that a module before the inner sequence has written is scored, not replaced.
    own = TensorDictModule(lambda x: (x + 1, x + 2), ["raw"], ["obs", "action"])
    out = ProbabilisticTensorDictSequential(own, sequence())(td.copy())
    assert torch.equal(out["action"], td["raw"] + 2)
    torch.testing.assert_close(out["lp"], sequence(tdnn).log_prob(out.copy()))


def test_num_samples():
    td = obs_td(3)
    kwargs = {"num_samples": (2,), "default_interaction_type": "random"}
    assert sequence(**kwargs).num_samples == (2,)
    out, expected = both(lambda library: sequence(library, **kwargs), td)
    assert_same(out, expected)
    assert out.batch_size == (2, 3)


# --- calls ---


@pytest.mark.parametrize("kind", [RANDOM, MODE, "mean", "deterministic"], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_against_upstream(kind, batch):
    td = obs_td(*batch)
    with set_interaction_type(kind):
        assert_same(*both(sequence, td))


def test_an_empty_batch():
    out = sequence(default_interaction_type="random")(obs_td(0))
    assert out["action"].shape == (0, 4)
    assert out["lp"].shape == (0,)


def test_calls_with_tensors():
    td = obs_td(3)
    for call in (lambda m: m(td["obs"]), lambda m: m(obs=td["obs"])):
        ours, theirs = call(sequence()), call(sequence(tdnn))
        torch.testing.assert_close(ours, theirs)
        assert len(ours) == 4


def test_the_modules_see_the_type_of_the_head():
    seen = []

    def look(x):
        seen.append(fp.interaction_type())
        return 2 * x, x.exp()

    net = TensorDictModule(look, ["obs"], ["loc", "scale"])
    seq = ProbabilisticTensorDictSequential(net, head(default_interaction_type="random"))
    seq(obs_td(3))
    seq.get_dist(obs_td(3))
    with set_interaction_type("mean"):
        seq(obs_td(3))
    assert seen == [RANDOM, RANDOM, fp.InteractionType.MEAN]
    assert fp.interaction_type() is None


OUTS = {
    "nothing": lambda: None,
    "empty": lambda: TensorDict(batch_size=[3]),
    "with an entry": lambda: TensorDict(kept=torch.zeros(3), batch_size=[3]),
    "with an out-key": lambda: TensorDict(loc=torch.zeros(3, 4), batch_size=[3]),
}


@pytest.mark.parametrize("inplace", [None, True, False, "empty"])
@pytest.mark.parametrize("selected", [None, ["action"], ["lp", "action"], ["obs2"]], ids=str)
@pytest.mark.parametrize("out", OUTS)
def test_what_is_written_where(inplace, selected, out):
    """Which object is returned, and the keys and their order of all three tensordicts."""
    results = []
    for library in LIBRARIES:
        seq = library.ProbabilisticTensorDictSequential(
            TensorDictModule(lambda x: x + 1, ["obs"], ["obs2"]),
            TensorDictModule(lambda x: (2 * x, x.exp()), ["obs2"], ["loc", "scale"]),
            parts(library)[1],
            inplace=inplace,
            selected_out_keys=selected,
        )
        td, target = obs_td(3), OUTS[out]()
        td["obs"][:] = torch.arange(4.0)
        td["action"] = torch.zeros(3, 4)
        result = seq(td, target) if target is not None else seq(td)
        which = "input" if result is td else "output" if result is target else "new"
        results.append((seq.out_keys, which, result, td, target))
    (out_keys, which, *ours), (their_out_keys, their_which, *theirs) = results
    assert (out_keys, which) == (their_out_keys, their_which)
    for a, b in zip(ours, theirs, strict=True):
        if a is None:
            continue
        if selected is None or inplace is not None or out != "nothing":
            assert_same(a, b)
        else:
            # Upstream writes these in the order of a set, another one in each process.
            assert set(keys(a)) == set(keys(b))
            assert_same(a.select(*sorted(keys(a), key=str)), b.select(*sorted(keys(b), key=str)))


def test_the_order_under_selected_out_keys():
    seq = sequence(seq={"selected_out_keys": ["lp", "action"]})
    td = obs_td(3)
    # That in which the modules write; upstream's is that of a set.
    assert keys(seq(td)) == ["obs", "action", "lp"]


def test_select_out_keys_and_back():
    seq = sequence()
    assert seq.select_out_keys("action") is seq
    assert seq.out_keys == ["action"]
    assert set(keys(seq(obs_td(3)))) == {"obs", "action"}
    seq.reset_out_keys()
    assert set(keys(seq(obs_td(3)))) == {"obs", "loc", "scale", "action", "lp"}


@pytest.mark.parametrize("compiled", [False, True])
def test_set_skip_existing(compiled):
    seq = sequence()
    td = obs_td(3)
    td.update({"action": torch.zeros(3, 4), "lp": torch.zeros(3)})
    td.update({"loc": torch.zeros(3, 4), "scale": torch.ones(3, 4)})
    call = seq
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(seq, backend="aot_eager", fullgraph=True)
    with set_skip_existing(True):
        assert_same(call(td.copy()), td)
    assert torch.equal(call(td.copy())["action"], 2 * td["obs"])


def test_the_sample_of_an_earlier_module_is_only_scored():
    """Upstream's second case of skipping: a module before the head writes the sample itself."""

    def build(library):
        own = TensorDictModule(
            lambda x: (2 * x, x.exp(), x + 1), ["obs"], ["loc", "scale", "action"]
        )
        return library.ProbabilisticTensorDictSequential(
            own, parts(library, default_interaction_type="random")[1]
        )

    td = obs_td(3)
    out, expected = both(build, td)
    assert_same(out, expected)
    assert torch.equal(out["action"], td["obs"] + 1)
    dist = indep_normal(loc=out["loc"], scale=out["scale"])
    torch.testing.assert_close(out["lp"], dist.log_prob(td["obs"] + 1))
    torch._dynamo.reset()
    compiled = torch.compile(build(fp), backend="aot_eager", fullgraph=True)
    assert_same(compiled(td.copy()), out)


def tolerant():
    return ProbabilisticTensorDictSequential(
        TensorDictModule(lambda x: x + 1, ["other"], ["more"]), *parts(), partial_tolerant=True
    )


@pytest.mark.parametrize("present", [["obs"], ["other"], ["obs", "other"], []], ids=str)
def test_partial_tolerant(present):
    # Upstream leaves no module before the head out, whatever partial_tolerant says.
    td = TensorDict({k: torch.ones(3, 4) for k in present}, batch_size=[3])
    out = tolerant()(td)
    more = ["more"] if "other" in present else []
    written = ["loc", "scale", "action", "lp"] if "obs" in present else []
    assert keys(out) == [*present, *more, *written]
    if written:
        assert (out["action"] == 2).all()


def test_partial_tolerant_on_a_lazy_stack():
    lazy = LazyStackedTensorDict.lazy_stack(
        [
            TensorDict(obs=torch.ones(4), batch_size=[]),
            TensorDict(obs=torch.ones(4), other=torch.ones(4), batch_size=[]),
        ]
    )
    out = tolerant()(lazy)
    assert (out["action"] == 2).all()
    assert "more" in keys(lazy.tensordicts[1])
    assert "more" not in keys(lazy.tensordicts[0])


# --- distributions and scores ---


def test_get_dist_and_get_dist_params():
    seq = sequence()
    td = obs_td(3)
    dist = seq.get_dist(td)
    assert keys(td) == ["obs", "loc", "scale"]
    assert dist.base_dist.loc is td["loc"]
    assert seq.build_dist_from_params(normal_td(3)).batch_shape == (3,)
    ours, theirs = both(sequence, obs_td(3), lambda seq, td: seq.get_dist_params(td))
    assert_same(ours, theirs)


def test_get_dist_with_tensordict_out():
    for call in ("get_dist", "get_dist_params"):
        td, out = obs_td(3), TensorDict(batch_size=[3])
        with unchanged(td):
            result = getattr(sequence(), call)(td, out)
        assert keys(out) == ["loc", "scale"]
        if call == "get_dist_params":
            assert result is out
        else:
            assert torch.equal(result.mean, out["loc"])


def test_an_overridden_get_dist_is_seen_by_the_sequence():
    class Wide(ProbabilisticTensorDictModule):
        def get_dist(self, tensordict):
            return D.Independent(D.Laplace(tensordict["loc"], 10.0), 1)

    seq = ProbabilisticTensorDictSequential(network(), head(Wide, return_log_prob=True))
    td = obs_td(3)
    out = seq(td)
    dist = D.Independent(D.Laplace(out["loc"], 10.0), 1)
    for built in (seq.get_dist(td), seq.build_dist_from_params(td)):
        assert isinstance(built.base_dist, D.Laplace)
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(out["action"]))
    torch.testing.assert_close(seq.log_prob(td), out["sample_log_prob"])


def test_log_prob():
    td = obs_td(3, action=torch.randn(3, 4))
    ours, theirs = both(sequence, td, lambda seq, td: seq.log_prob(td))
    torch.testing.assert_close(ours, theirs)
    dist = indep_normal(loc=torch.zeros(3, 4), scale=torch.ones(3, 4))
    torch.testing.assert_close(
        sequence().log_prob(td.copy(), dist=dist), dist.log_prob(td["action"])
    )


def test_log_prob_with_tensordict_out():
    td, out = obs_td(3, action=torch.randn(3, 4)), TensorDict(batch_size=[3])
    seq = sequence()
    with unchanged(td):
        result = seq.log_prob(td, out)
    assert keys(out) == ["lp"]
    assert torch.equal(out["lp"], result)
    torch.testing.assert_close(result, seq.log_prob(td.copy()))


# --- several heads ---


@pytest.mark.parametrize("kind", ["random", "mode"])
def test_two_heads(kind):
    td = obs_td(3)
    assert two_heads().return_composite is True
    with set_interaction_type(kind):
        assert_same(*both(two_heads, td))


def test_get_dist_of_two_heads_is_composite_and_conditional():
    td = obs_td(3)
    with set_interaction_type("random"):
        with unchanged(td):
            two_heads().get_dist(td)
        ours, theirs = both(two_heads, td, lambda seq, td: seq.get_dist(td))
    assert isinstance(ours, tdnn.CompositeDistribution)
    assert list(ours.dists) == list(theirs.dists) == ["x", "y"]
    for key in ours.dists:
        torch.testing.assert_close(ours.dists[key].mean, theirs.dists[key].mean)
    assert not torch.equal(ours.dists["y"].mean, td["obs"])


def test_log_prob_of_two_heads():
    td = obs_td(3, x=torch.randn(3, 4), y=torch.randn(3, 4))
    with set_interaction_type("mode"):
        ours, theirs = both(two_heads, td, lambda seq, td: seq.log_prob(td))
        assert_same(ours, theirs)
        out = TensorDict(batch_size=[3])
        with unchanged(td):
            two_heads().log_prob(td, out)
    assert_same(out.select(*keys(ours)), ours)


def test_return_composite_false_takes_the_last_head():
    def build(library):
        return two_heads(library, return_composite=False)

    td = obs_td(3)
    assert_same(*both(build, td))
    dist = build(fp).get_dist(td.copy())
    assert isinstance(dist, D.Normal)
    assert build(fp).return_composite is False


def test_a_head_in_the_middle():
    def build(library):
        return library.ProbabilisticTensorDictSequential(
            normal_head(library, "obs", "x"), TensorDictModule(lambda x: x + 1, ["x"], ["z"])
        )

    td = obs_td(3)
    assert build(fp).return_composite is True
    out, expected = both(build, td)
    assert_same(out, expected)
    assert torch.equal(out["z"], td["obs"] + 1)
    with set_interaction_type("mode"):
        ours, theirs = both(build, td, lambda seq, td: seq.get_dist(td))
    assert list(ours.dists) == list(theirs.dists) == ["x"]


def test_no_head_at_all():
    def build(library):
        return library.ProbabilisticTensorDictSequential(
            network(), TensorDictModule(lambda x: x + 1, ["loc"], ["y"])
        )

    td = obs_td(3)
    seq = build(fp)
    assert_same(*both(build, td))
    assert seq.det_part is None
    assert seq.dist_sample_keys == []
    assert seq.dist_params_keys == []
    assert seq.in_keys == ["obs"]
    assert seq.out_keys == ["loc", "scale", "y"]
    with pytest.raises(RuntimeError, match="no probabilistic module"):
        seq.get_dist(td.copy())
    with pytest.raises(RuntimeError):
        seq.build_dist_from_params(td.copy())
    assert seq(obs=td["obs"])[2].shape == (3, 4)


# --- edits ---


def shifted(by):
    return TensorDictModule(lambda x: (x + by, x.exp()), ["obs"], ["loc", "scale"])


@pytest.mark.parametrize("form", ["modules", "OrderedDict"])
def test_a_replaced_module_is_live(form):
    seq = ProbabilisticTensorDictSequential(*FORMS[form](*parts()))
    td = obs_td(3)
    assert torch.equal(seq(td.copy())["action"], 2 * td["obs"])
    first, last = (0, 1) if form == "modules" else ("net", "head")
    seq[first] = shifted(5)
    assert torch.equal(seq(td.copy())["action"], td["obs"] + 5)
    assert torch.equal(seq.get_dist(td.copy()).mean, td["obs"] + 5)
    assert torch.equal(seq.det_part(td.copy())["loc"], td["obs"] + 5)
    seq[last] = head(out_keys=["other"])
    assert seq.out_keys == ["loc", "scale", "other"]
    assert seq.dist_sample_keys == ["other"]
    assert keys(seq(td.copy())) == ["obs", "loc", "scale", "other"]
    assert seq[first].out_keys == ["loc", "scale"]


def test_a_replaced_module_is_let_go():
    seq = sequence()
    seq(obs_td(3))
    gone = weakref.ref(seq[0])
    seq[0] = shifted(5)
    seq(obs_td(3))
    gc.collect()
    assert gone() is None


def test_a_replaced_module_of_other_keys_changes_those_of_the_sequence():
    seq = sequence()
    seq[0] = TensorDictModule(lambda x: (x, x.exp()), ["pixels"], ["loc", "scale"])
    assert seq.in_keys == ["pixels"]
    assert seq(TensorDict(pixels=torch.zeros(2), batch_size=[]))["action"].tolist() == [0, 0]


def test_a_module_that_now_writes_the_sample_is_noticed():
    seq = sequence(default_interaction_type="random")
    td = obs_td(3)
    seq(td.copy())
    seq[0] = TensorDictModule(
        lambda x: (2 * x, x.exp(), x + 1), ["obs"], ["loc", "scale", "action"]
    )
    assert torch.equal(seq(td.copy())["action"], td["obs"] + 1)
    seq[0] = network()
    assert not torch.equal(seq(td.copy())["action"], td["obs"] + 1)


def test_a_slice_of_modules_is_replaced():
    seq = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda x: x + 1, ["obs"], ["obs"]), *parts()
    )
    td = obs_td(3)
    seq[0:2] = [TensorDictModule(lambda x: x + 2, ["obs"], ["obs"]), shifted(1)]
    torch.testing.assert_close(seq(td.copy())["action"], td["obs"] + 3)


@pytest.mark.parametrize("index", [0, -3, slice(0, 1)], ids=str)
def test_a_deleted_module_is_gone(index):
    seq = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda x: x + 1, ["extra"], ["more"]), *parts()
    )
    td = obs_td(3, extra=torch.zeros(3))
    assert "more" in keys(seq(td.copy()))
    del seq[index]
    assert len(seq) == 2
    assert seq.in_keys == ["obs"]
    assert keys(seq(td.copy())) == ["obs", "extra", "loc", "scale", "action", "lp"]
    assert torch.equal(seq(td.copy())["action"], 2 * td["obs"])


def test_a_deleted_module_by_name():
    net, last = parts()
    seq = ProbabilisticTensorDictSequential(
        {"extra": TensorDictModule(lambda x: x + 1, ["extra"], ["more"]), "net": net, "head": last}
    )
    del seq["extra"]
    assert list(seq.module._modules) == ["net", "head"]
    assert seq.in_keys == ["obs"]


def test_edits_keep_the_selected_keys():
    seq = sequence(seq={"selected_out_keys": ["action"]})
    seq[0] = shifted(5)
    assert seq.out_keys == ["action"]
    td = obs_td(3)
    assert set(keys(seq(td))) == {"obs", "action"}


def test_items_and_slices():
    net, last = parts()
    pre = TensorDictModule(lambda x: x + 1, ["obs"], ["obs"])
    seq = ProbabilisticTensorDictSequential(pre, net, last)
    assert seq[0] is pre
    assert seq[-1] is last
    tail, det = seq[1:], seq[:-1]
    assert type(tail) is ProbabilisticTensorDictSequential
    assert type(det) is TensorDictSequential
    td = obs_td(3)
    assert torch.equal(tail(td.copy())["action"], 2 * td["obs"])
    assert torch.equal(det(td.copy())["loc"], 2 * td["obs"] + 2)
    assert tail[0] is net
    everything = seq[:]
    assert [everything[i] for i in range(3)] == [pre, net, last]
    with pytest.raises(IndexError, match="empty"):
        _ = seq[3:]


def test_slices_of_named_modules_keep_their_names():
    net, last = parts()
    pre = TensorDictModule(lambda x: x + 1, ["obs"], ["obs"])
    seq = ProbabilisticTensorDictSequential(collections.OrderedDict(pre=pre, net=net, head=last))
    assert seq["net"] is net
    tail = seq[1:]
    assert type(tail) is ProbabilisticTensorDictSequential
    assert list(tail.module._modules) == ["net", "head"]


def test_slices_keep_return_composite_and_partial_tolerant():
    seq = ProbabilisticTensorDictSequential(
        normal_head(fp, "obs", "x"),
        normal_head(fp, "x", "y"),
        TensorDictModule(lambda x: x, ["y"], ["z"]),
        partial_tolerant=True,
    )
    part = seq[:2]
    assert type(part) is ProbabilisticTensorDictSequential
    assert part.return_composite is True
    assert part.partial_tolerant is True
    safe = fp.SafeProbabilisticTensorDictSequential(*parts())
    assert type(safe[:]) is fp.SafeProbabilisticTensorDictSequential


def test_select_subsequence():
    for kwargs in ({"out_keys": ["loc"]}, {"in_keys": ["loc", "scale"]}, {"out_keys": ["action"]}):
        ours, theirs = (
            library.ProbabilisticTensorDictSequential(
                *parts(library), TensorDictModule(lambda x: x, ["action"], ["z"])
            ).select_subsequence(**kwargs)
            for library in LIBRARIES
        )
        assert ours.in_keys == theirs.in_keys
        assert ours.out_keys == theirs.out_keys
        assert type(ours).__name__ == type(theirs).__name__
        if "out_keys" in kwargs:
            td = obs_td(3)
            assert_same(ours(td.copy()), theirs(td.copy()))


# --- inheritance ---


class Cooperative(ProbabilisticTensorDictSequential, rlm.SafeSequential):
    """Put together as TorchRL's own SafeProbabilisticTensorDictSequential is."""

    def __init__(self, *modules, partial_tolerant=False):
        super().__init__(*modules, partial_tolerant=partial_tolerant)
        super(tdnn.ProbabilisticTensorDictSequential, self).__init__(
            *modules, partial_tolerant=partial_tolerant
        )


class CooperativeHere(ProbabilisticTensorDictSequential, rlm.SafeSequential):
    """The same with the name as it stands in a module that imports fastprob's class."""

    def __init__(self, *modules, partial_tolerant=False):
        super().__init__(*modules, partial_tolerant=partial_tolerant)
        super(ProbabilisticTensorDictSequential, self).__init__(
            *modules, partial_tolerant=partial_tolerant
        )


@pytest.mark.parametrize("cls", [Cooperative, CooperativeHere])
def test_cooperative_inheritance(cls):
    net = rlm.SafeModule(Twice(), in_keys=["obs"], out_keys=["loc", "scale"])
    last = head(
        fp.SafeProbabilisticModule,
        spec=rl.Bounded(-1, 1, (4,)),
        safe=True,
        return_log_prob=True,
    )
    policy = cls(net, last)
    assert isinstance(policy, rlm.SafeSequential)
    td = obs_td(30)
    out = policy(td.copy())
    assert torch.equal(out["action"], (2 * td["obs"]).clamp(-1, 1))
    assert policy.spec["action"].shape == (4,)
    assert policy.get_dist(td.copy()).batch_shape == (30,)
    assert policy.log_prob(out).shape == (30,)
    assert policy.return_composite is False
    policy[0] = rlm.SafeModule(lambda x: (x, x.exp()), in_keys=["obs"], out_keys=["loc", "scale"])
    assert torch.equal(policy(td.copy())["action"], td["obs"].clamp(-1, 1))


def test_a_subclass_with_a_constructor_of_its_own():
    class Policy(ProbabilisticTensorDictSequential):
        def __init__(self, *modules):
            super().__init__(*modules)

    policy = Policy(TensorDictModule(lambda x: x + 1, ["obs"], ["obs"]), *parts())
    td = obs_td(3)
    assert torch.equal(policy(td.copy())["action"], 2 * td["obs"] + 2)


# --- tensordicts, hooks, copies, compile ---


def test_locked():
    td = obs_td(3).lock_()
    with unchanged(td), pytest.raises(RuntimeError, match="lock"):
        sequence()(td)
    out = sequence()(td, TensorDict(batch_size=[3]))
    assert keys(out) == ["loc", "scale", "action", "lp"]


def test_lazily_stacked():
    items = [obs_td() for _ in range(3)]
    dense = sequence()(torch.stack([i.copy() for i in items]))
    lazy = sequence()(LazyStackedTensorDict.lazy_stack(items))
    assert isinstance(lazy, LazyStackedTensorDict)
    for key, value in entries(dense):
        torch.testing.assert_close(lazy[key], value)


def test_forward_hooks():
    seq = sequence()
    seen = []
    seq.register_forward_hook(lambda m, args, out: seen.append(("seq", keys(out))))
    seq[-1].register_forward_hook(lambda m, args, out: seen.append(("head", keys(out))))
    seq[0].register_forward_pre_hook(lambda m, args: seen.append(("net", keys(args[0]))))
    seq(obs_td(3))
    written = ["obs", "loc", "scale", "action", "lp"]
    assert seen == [("net", ["obs"]), ("head", written), ("seq", written)]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("form", ["modules", "OrderedDict"])
def test_copies(clone, called, form):
    seq = ProbabilisticTensorDictSequential(
        *FORMS[form](*parts(generator=3, default_interaction_type="random"))
    )
    td = obs_td(3)
    if called:
        seq(td.copy())
    other = clone(seq)
    assert_same(other(td.copy()), seq(td.copy()))
    other[0 if form == "modules" else "net"] = shifted(1)
    assert torch.equal(other.get_dist(td.copy()).mean, td["obs"] + 1)
    assert torch.equal(seq.get_dist(td.copy()).mean, 2 * td["obs"])


def test_gradients_reach_the_network():
    grads = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), tdnn.NormalParamExtractor())
        seq = library.ProbabilisticTensorDictSequential(
            TensorDictModule(net, ["obs"], ["loc", "scale"]),
            parts(library, default_interaction_type="random")[1],
        )
        out = seq(obs_td(5))
        (out["action"].square().sum() + out["lp"].sum()).backward()
        grads.append([p.grad for p in seq.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", [RANDOM, MODE], ids=str)
def test_compiled_without_a_break(kind):
    seq = sequence(default_interaction_type=kind)
    td = obs_td(3)
    torch._dynamo.reset()
    compiled = torch.compile(seq, backend="aot_eager", fullgraph=True)
    results = []
    for call in (seq, compiled):
        torch.manual_seed(5)
        results.append(call(td.copy()))
    assert_same(results[1], results[0])


def test_an_overridden_get_dist_params_is_asked_in_front_of_an_extractor():
    class Louder(fp.ProbabilisticTensorDictSequential):
        def get_dist_params(self, tensordict, tensordict_out=None, **kwargs):
            params = super().get_dist_params(tensordict, tensordict_out, **kwargs)
            return params.set("loc", params["loc"] + 100.0)

    network = tdnn.TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), tdnn.NormalParamExtractor()),
        ["observation"],
        ["loc", "scale"],
    )
    head = fp.ProbabilisticTensorDictModule(
        ["loc", "scale"], ["action"], distribution_class=torch.distributions.Normal
    )
    td = TensorDict(observation=torch.zeros(5, 3), batch_size=[5])
    assert Louder(network, head)(td)["action"].min() > 50
