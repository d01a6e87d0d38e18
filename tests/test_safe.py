"""SafeProbabilisticModule and its sequence: projection, specs, and random values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchrl.data as rl
import torchrl.modules as rlm
from tensordict import TensorDict
from tensordict import nn as tdnn
from tensordict.nn import set_skip_existing
from torch import distributions as D

import fastprob as fp
from fastprob import (
    ProbabilisticTensorDictModule,
    SafeProbabilisticModule,
    SafeProbabilisticTensorDictSequential,
    distributions,
    set_interaction_type,
    specs,
)
from tests._modules import TYPES, assert_same, head, indep_normal, keys, normal_td, unchanged

LIBRARIES = pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])


def wide_td(*batch, **kwargs):
    """Means and scales that leave the unit box in most elements."""
    td = normal_td(*batch, **kwargs)
    td["loc"].mul_(3)
    return td


def safe(library=specs, **kwargs):
    config = {"spec": library.Bounded(-1, 1, shape=(4,)), "safe": True}
    config.update(kwargs)
    return head(SafeProbabilisticModule, **config)


def upstream_safe(**kwargs):
    config = {"spec": rl.Bounded(-1, 1, shape=(4,)), "safe": True}
    config.update(kwargs)
    return head(rlm.SafeProbabilisticModule, **config)


# --- projection ---


@LIBRARIES
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_values_are_projected_and_scored_as_drawn(library, kind):
    td = wide_td(50)
    module = safe(library, return_log_prob=True, default_interaction_type=kind)
    plain = head(return_log_prob=True, default_interaction_type=kind)
    torch.manual_seed(1)
    out = module(td.copy())
    torch.manual_seed(1)
    raw = plain(td.copy())
    assert (raw["action"].abs() > 1).sum() > 20
    assert torch.equal(out["action"], raw["action"].clamp(-1, 1))
    assert torch.equal(out["sample_log_prob"], raw["sample_log_prob"])
    dist = indep_normal(loc=td["loc"], scale=td["scale"])
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(raw["action"]))
    # That of the projected value is another one.
    assert (out["sample_log_prob"] - dist.log_prob(out["action"])).abs().max() > 1
    assert module.spec["action"].is_in(out["action"])


@LIBRARIES
def test_the_clamp_stops_the_gradient(library):
    td = TensorDict(
        loc=torch.tensor([[-3.0, -0.5, 0.5, 3.0]], requires_grad=True),
        scale=torch.full((1, 4), 1e-3),
        batch_size=[1],
    )
    out = safe(library, default_interaction_type="random")(td)
    assert out["action"][0, [0, 3]].tolist() == [-1, 1]
    out["action"].sum().backward()
    assert td["loc"].grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_the_example_of_the_documentation():
    module = SafeProbabilisticModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=torch.distributions.Normal,
        safe=True,
        spec=specs.Bounded(low=-1, high=1, shape=()),
        default_interaction_type=fp.InteractionType.RANDOM,
    )
    torch.manual_seed(0)
    data = TensorDict(
        loc=torch.zeros(10, requires_grad=True), scale=torch.full((10,), 10.0), batch_size=(10,)
    )
    data = module(data)
    # As printed there.
    assert data["action"].tolist() == [1, -1, -1, 1, -1, -1, 1, 1, -1, -1]
    data["action"].mean().backward()
    assert data["loc"].grad.tolist() == [0] * 10


# With num_samples upstream does not repeat deterministic values.
@pytest.mark.parametrize(
    ("kind", "num_samples"),
    [("random", None), ("random", 2), ("mode", None), ("mean", None), ("deterministic", None)],
)
@pytest.mark.parametrize("score", [False, True])
def test_against_upstream(kind, num_samples, score):
    kwargs = {
        "return_log_prob": score,
        "log_prob_key": "lp",
        "num_samples": num_samples,
        "default_interaction_type": kind,
        "distribution_class": rlm.IndependentNormal,
    }
    results = []
    for module in (safe(rl, **kwargs), upstream_safe(**kwargs)):
        td = wide_td(1)
        td["loc"][:], td["scale"][:] = 2.0, 1.5
        torch.manual_seed(3)
        results.append(module(td))
    assert_same(*results)


def test_a_module_that_is_not_safe_does_not_project():
    td = wide_td(20)
    module = safe(safe=False)
    assert module.safe is False
    assert torch.equal(module(td)["action"], td["loc"])
    assert module.spec["action"] == specs.Bounded(-1, 1, shape=(4,))


def test_per_element_bounds_and_integers():
    low, high = torch.tensor([-1.0, -2, 0, 0]), torch.tensor([1.0, 0.5, 3, 0])
    td = wide_td(20)
    out = safe(spec=specs.Bounded(low, high))(td)
    assert torch.equal(out["action"], td["loc"].clamp(low, high))


@LIBRARIES
def test_vmap(library):
    module = safe(library, return_log_prob=True)
    td = wide_td(5, 3)
    expected = module(td.copy())
    out = torch.vmap(lambda one: module(one))(td.copy())
    torch.testing.assert_close(out["action"], expected["action"])
    torch.testing.assert_close(out["sample_log_prob"], expected["sample_log_prob"])
    with set_interaction_type("random"):
        drawn = torch.vmap(lambda one: module(one), randomness="different")(td.copy())
    assert drawn["action"].abs().max() == 1


def test_vmap_over_the_parameters_of_a_safe_policy():
    policy = SafeProbabilisticTensorDictSequential(
        tdnn.TensorDictModule(
            torch.nn.Sequential(torch.nn.Linear(3, 8), tdnn.NormalParamExtractor()),
            ["obs"],
            ["loc", "scale"],
        ),
        safe(spec=specs.Bounded(-0.1, 0.1, shape=(4,)), return_log_prob=True),
    )
    td = TensorDict(obs=torch.randn(6, 3), batch_size=[6])
    params = TensorDict.from_module(policy).expand(2)

    def call(td, params):
        with params.to_module(policy):
            return policy(td)

    out = torch.vmap(call, (None, 0))(td, params)
    assert out["action"].shape == (2, 6, 4)
    assert out["action"].abs().max() <= 0.1
    expected = policy(td.copy())
    torch.testing.assert_close(out["action"][1], expected["action"])


def test_compiled_without_a_break():
    module = safe(return_log_prob=True, default_interaction_type="random")
    td = wide_td(3)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled):
        torch.manual_seed(5)
        results.append(call(td.copy()))
    assert_same(results[1], results[0])
    assert results[1]["action"].abs().max() == 1


def test_a_value_that_is_there_is_projected():
    td = wide_td(3)
    td["action"] = torch.full((3, 4), 2.0)
    module = safe()
    assert (module(td.copy(), _requires_sample=False)["action"] == 1).all()
    scored = safe(return_log_prob=True)(td.copy(), _requires_sample=False)
    assert (scored["action"] == 1).all()
    expected = indep_normal(loc=td["loc"], scale=td["scale"]).log_prob(td["action"])
    torch.testing.assert_close(scored["sample_log_prob"], expected)
    with set_skip_existing(True):
        assert (module(td.copy())["action"] == 1).all()
        assert (upstream_safe()(td.copy())["action"] == 1).all()


def test_the_input_is_not_changed_in_place():
    td = TensorDict(loc=torch.full((3, 4), 5.0), scale=torch.ones(3, 4), batch_size=[3])
    module = safe()
    with unchanged(td):
        out = module(td, TensorDict(batch_size=[3]))
    assert (out["action"] == 1).all()


def test_specs_of_several_keys():
    params = TensorDict(
        a=TensorDict(loc=torch.full((3, 2), 5.0), scale=torch.ones(3, 2)),
        b=TensorDict(loc=torch.full((3, 2), 5.0), scale=torch.ones(3, 2)),
        c=TensorDict(logits=torch.randn(3, 4)),
        batch_size=[3],
    )
    module = SafeProbabilisticModule(
        in_keys=["params"],
        spec=specs.Composite(
            {
                "a": specs.Bounded(-1, 1, (2,)),
                "agent": specs.Composite({"b": specs.Bounded(0, 2, (2,))}),
            }
        ),
        safe=True,
        return_log_prob=True,
        distribution_class=tdnn.CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {"a": D.Normal, "b": D.Normal, "c": D.Categorical},
            "name_map": {"a": "a", "b": ("agent", "b"), "c": "c"},
        },
    )
    assert set(module.spec.keys(True, True)) == {"a", ("agent", "b"), "c"}
    assert module.spec["c"] is None
    out = module(TensorDict(params=params, batch_size=[3]))
    assert (out["a"] == 1).all()
    assert (out["agent", "b"] == 2).all()
    torch.testing.assert_close(out["a_log_prob"], D.Normal(5, 1).log_prob(torch.full((3, 2), 5.0)))
    assert out["c"].dtype is torch.int64


# --- spec ---


def test_the_spec_is_a_copy_in_a_composite():
    spec = specs.Bounded(-1, 1, shape=(4,))
    module = safe(spec=spec, safe=False)
    assert isinstance(module.spec, specs.Composite)
    assert list(module.spec.keys()) == ["action"]
    assert module.spec["action"] == spec
    assert module.spec["action"] is not spec
    assert isinstance(safe(rl).spec, rl.Composite)
    none = safe(spec=None, safe=False)
    assert none.spec["action"] is None


@LIBRARIES
def test_setting_the_spec_changes_the_projection(library):
    module = safe(library)
    td = wide_td(20)
    assert module(td.copy())["action"].abs().max() == 1
    module.spec = library.Composite({"action": library.Bounded(-0.5, 0.25, shape=(4,))})
    assert torch.equal(module(td.copy())["action"], td["loc"].clamp(-0.5, 0.25))
    assert module.spec["action"].low.min() == -0.5
    with pytest.raises(RuntimeError, match="must be a Composite") as caught:
        module.spec = library.Bounded(-1, 1, shape=(4,))
    assert "Bounded" in str(caught.value)
    assert "action" in str(caught.value)
    assert torch.equal(module(td.copy())["action"], td["loc"].clamp(-0.5, 0.25))


def test_moving_a_module_moves_its_spec():
    module = safe()
    assert module.to("cpu") is module
    assert module.spec["action"].device == torch.device("cpu")
    td = wide_td(3, dtype=torch.float64)
    module.to(torch.float64)
    out = module(td)
    assert out["action"].dtype is torch.float64
    assert torch.equal(out["action"], td["loc"].clamp(-1, 1))


def test_the_entry_of_an_unnamed_key_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match='"_"'):
        SafeProbabilisticModule(
            in_keys=["param"], spec=specs.Composite({"_": specs.Bounded(-1, 1, (4,))})
        )


# --- random ---


@LIBRARIES
@pytest.mark.parametrize("method", ["random", "random_sample"])
def test_random_draws_from_the_spec(library, method):
    module = safe(library, safe=False)
    for batch in ((), (100,), (2, 3)):
        td = TensorDict(batch_size=batch)
        assert getattr(module, method)(td) is td
        assert keys(td) == ["action"]
        assert td["action"].shape == (*batch, 4)
        assert td["action"].abs().max() <= 1
    assert td["action"].unique().numel() > 1


def test_random_writes_the_first_key_only():
    module = SafeProbabilisticModule(
        in_keys=["params"],
        out_keys=["a", ("b", "c")],
        distribution_class=tdnn.CompositeDistribution,
        spec=specs.Composite({"a": specs.Bounded(0, 1, (2,)), "b": {"c": specs.Unbounded((3,))}}),
    )
    td = module.random(TensorDict(batch_size=[5]))
    assert keys(td) == ["a"]


@pytest.mark.parametrize("method", ["random", "random_sample"])
def test_random_without_a_spec(method):
    module = safe(spec=None, safe=False)
    td = TensorDict(batch_size=[2])
    with pytest.raises(RuntimeError, match=r"needs a spec for 'action'"):
        getattr(module, method)(td)
    assert keys(td) == []


# --- sequence ---


def network():
    return tdnn.TensorDictModule(lambda x: (x, x.exp()), ["obs"], ["loc", "scale"])


@LIBRARIES
def test_sequence(library):
    policy = SafeProbabilisticTensorDictSequential(network(), safe(library, return_log_prob=True))
    assert isinstance(policy, tdnn.ProbabilisticTensorDictSequential)
    td = policy(TensorDict(obs=torch.full((3, 4), 2.0), batch_size=[3]))
    assert (td["action"] == 1).all()
    assert set(policy.spec.keys(True, True)) == set(policy.out_keys)
    assert policy.out_keys == ["loc", "scale", "action", "sample_log_prob"]
    assert policy.spec["loc"] is policy.spec["sample_log_prob"] is None
    assert policy.spec["action"] == library.Bounded(-1, 1, shape=(4,))
    drawn = TensorDict(batch_size=[50])
    assert policy.random(drawn) is drawn
    assert keys(drawn) == ["action"]
    assert drawn["action"].abs().max() <= 1
    assert keys(policy.random_sample(TensorDict(batch_size=[2]))) == ["action"]


def test_the_spec_of_a_sequence_of_both_libraries():
    """A network with TorchRL's spec before a head with fastprob's, and the other way round."""
    for one, other in ((rl, specs), (specs, rl)):
        first = SafeProbabilisticModule(
            in_keys=["obs"],
            out_keys=["x"],
            spec=one.Bounded(-1, 1, shape=(4,)),
        )
        last = SafeProbabilisticModule(
            in_keys=["x"], out_keys=["y"], spec=other.Bounded(-1, 1, shape=(4,))
        )
        policy = SafeProbabilisticTensorDictSequential(first, last)
        spec = policy.spec
        assert set(spec.keys(True, True)) == {"x", "y"}
        assert spec["y"].shape == (4,)
        assert keys(policy.random(TensorDict(batch_size=[2]))) == ["y"]


def test_random_of_a_sequence_without_a_spec():
    policy = SafeProbabilisticTensorDictSequential(network(), head())
    with pytest.raises(RuntimeError, match="needs a spec for 'action'"):
        policy.random(TensorDict(batch_size=[2]))


def test_partial_tolerant():
    extra = tdnn.TensorDictModule(lambda x: x + 1, ["other"], ["more"])
    policy = SafeProbabilisticTensorDictSequential(extra, network(), safe(), partial_tolerant=True)
    td = policy(TensorDict(obs=torch.zeros(3, 4), batch_size=[3]))
    assert keys(td) == ["obs", "loc", "scale", "action"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@LIBRARIES
def test_copies(library, clone):
    module = safe(library)
    td = wide_td(5)
    assert_same(clone(module)(td.copy()), module(td.copy()))
    other = clone(module)
    other.spec = library.Composite({"action": library.Bounded(-2, 2, shape=(4,))})
    assert module(td.copy())["action"].abs().max() == 1


def test_classes():
    assert issubclass(SafeProbabilisticModule, ProbabilisticTensorDictModule)
    assert issubclass(SafeProbabilisticModule, tdnn.ProbabilisticTensorDictModule)


def test_the_spec_of_a_sequence_can_be_set_and_moves_with_it():
    net = tdnn.TensorDictModule(lambda x: x, in_keys=["x"], out_keys=["loc"])
    seq = SafeProbabilisticTensorDictSequential(net, safe(spec=specs.Unbounded(shape=(4,))))
    with pytest.raises(RuntimeError, match="must be a Composite"):
        seq.spec = specs.Bounded(-1, 1, shape=(4,))
    assert seq.spec["action"] is seq[-1].spec["action"]
    assert seq.to("meta") is seq
    assert seq[-1].spec["action"].device.type == seq.spec["action"].device.type == "meta"
    own = specs.Composite(action=specs.Unbounded(shape=(2, 4)))
    seq.spec = own
    assert seq.spec is own
    assert seq.to("meta").spec["action"].device.type == "meta"
    assert copy.deepcopy(seq).spec["action"] == seq.spec["action"]


@pytest.mark.parametrize("interaction", ["random", "mode", "median", "mean"])
@pytest.mark.parametrize(
    "family, spec",
    [
        (distributions.Categorical, specs.Categorical(5)),
        (distributions.Categorical, specs.Categorical(3)),
        (distributions.OneHotCategorical, specs.OneHot(5, dtype=torch.int64)),
        (distributions.OneHotCategorical, specs.OneHot(5, dtype=torch.float32)),
        (distributions.OneHotCategorical, specs.OneHot(5)),
    ],
    ids=["index", "fewer indices", "one-hot", "one-hot of floats", "one-hot of bools"],
)
def test_values_known_to_be_members_come_out_as_projected(family, spec, interaction):
    # A projection that a family makes superfluous is left out; the results must not show it.
    td = TensorDict(logits=torch.randn(6, 5), batch_size=[6])
    kwargs = {
        "in_keys": ["logits"],
        "out_keys": ["action"],
        "distribution_class": family,
        "default_interaction_type": interaction,
    }
    torch.manual_seed(1)
    found = SafeProbabilisticModule(**kwargs, spec=spec, safe=True)(td.copy())["action"]
    torch.manual_seed(1)
    drawn = ProbabilisticTensorDictModule(**kwargs)(td.copy())["action"]
    wanted = spec.project(drawn)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
