"""accelerate: what it replaces, what it keeps, what it leaves alone, and what it says."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import torchrl.data as rl
import torchrl.modules as rlm
from tensordict import TensorDict
from tensordict import nn as tdnn
from tensordict.nn import TensorDictParams, set_composite_lp_aggregate
from torch import distributions as D
from torch import nn
from torchrl.objectives import ClipPPOLoss

import fastprob as fp
from fastprob import accelerate, set_interaction_type
from tests._modules import TYPES, entries, indep_normal, keys
from tests._ulp import assert_within_ulps

OURS = (fp.ProbabilisticTensorDictModule, fp.ProbabilisticTensorDictSequential)
BOX = rl.Bounded(-0.5, 0.5, shape=(2,))


def data(*batch):
    return TensorDict(observation=torch.randn(*batch, 3), batch_size=batch)


def net(n_out=4):
    params = nn.Sequential(nn.Linear(3, n_out), nn.Tanh(), rlm.NormalParamExtractor())
    return tdnn.TensorDictModule(params, in_keys=["observation"], out_keys=["loc", "scale"])


def head(cls=tdnn.ProbabilisticTensorDictModule, **kwargs):
    config = {
        "in_keys": ["loc", "scale"],
        "out_keys": ["action"],
        "distribution_class": indep_normal,
        "return_log_prob": True,
    }
    config.update(kwargs)
    return cls(**config)


def actor(cls=rlm.ProbabilisticActor, **kwargs):
    config = {
        "in_keys": ["loc", "scale"],
        "spec": BOX,
        "safe": True,
        "distribution_class": rlm.IndependentNormal,
        "return_log_prob": True,
    }
    config.update(kwargs)
    return cls(net(), **config)


def categorical_actor(**kwargs):
    logits = tdnn.TensorDictModule(nn.Linear(3, 5), in_keys=["observation"], out_keys=["logits"])
    return rlm.ProbabilisticActor(
        logits, in_keys=["logits"], distribution_class=rlm.OneHotCategorical, **kwargs
    )


def composite_actor():
    split = tdnn.TensorDictModule(
        lambda x: (x, x.exp(), x),
        in_keys=["observation"],
        out_keys=[("params", "a", "loc"), ("params", "a", "scale"), ("params", "b", "logits")],
    )
    return rlm.ProbabilisticActor(
        split,
        in_keys=["params"],
        distribution_class=tdnn.CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {"a": D.Normal, "b": D.Categorical},
            "name_map": {"a": ("action", "a"), "b": ("action", "b")},
        },
        return_log_prob=True,
    )


def two_heads():
    first = head(default_interaction_type="random")
    second = head(in_keys={"loc": "action", "scale": "scale"}, out_keys=["second"])
    return tdnn.ProbabilisticTensorDictSequential(net(), first, second)


POLICIES = {
    "head": head,
    "sequence": lambda: tdnn.ProbabilisticTensorDictSequential(net(), head()),
    "named modules": lambda: tdnn.ProbabilisticTensorDictSequential({"net": net(), "head": head()}),
    "selected keys": lambda: tdnn.ProbabilisticTensorDictSequential(
        net(), head(), selected_out_keys=["action"]
    ),
    "two heads": two_heads,
    "safe head": lambda: head(
        rlm.SafeProbabilisticModule, distribution_class=rlm.TanhNormal, spec=BOX, safe=True
    ),
    "safe sequence": lambda: rlm.SafeProbabilisticTensorDictSequential(
        net(), head(rlm.SafeProbabilisticModule)
    ),
    "actor": actor,
    "actor without projection": functools.partial(actor, safe=False),
    "tanh actor": functools.partial(
        actor, distribution_class=rlm.TanhNormal, distribution_kwargs={"low": -0.5, "high": 0.5}
    ),
    "own log-prob key": functools.partial(actor, log_prob_key=("info", "score")),
    "samples": functools.partial(actor, num_samples=torch.Size([2])),
    "generator": functools.partial(actor, generator=7),
    "categorical actor": categorical_actor,
    "composite actor": composite_actor,
    "actor-critic": lambda: rlm.ActorValueOperator(
        tdnn.TensorDictModule(nn.Linear(3, 3), ["observation"], ["observation"]),
        actor(),
        rlm.ValueOperator(nn.Linear(3, 1), in_keys=["observation"]),
    ),
    "separate critic": lambda: rlm.ActorCriticWrapper(
        actor(), rlm.ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    ),
}
EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
CONFIGURATION = (
    "in_keys",
    "out_keys",
    "log_prob_keys",
    "dist_keys",
    "dist_params_keys",
    "dist_sample_keys",
    "default_interaction_type",
    "distribution_class",
    "num_samples",
    "return_log_prob",
    "cache_dist",
    "n_empirical_estimate",
    "spec",
    "safe",
    "partial_tolerant",
    "return_composite",
    "inplace",
    "training",
)


def twins(make):
    """Two equal policies, one of them accelerated."""
    torch.manual_seed(1)
    theirs = make()
    torch.manual_seed(1)
    return accelerate(make()), theirs


def probabilistic(policy):
    return [m for m in policy.modules() if isinstance(m, (*OURS, *OURS[0].__bases__))]


def call(policy, td):
    torch.manual_seed(0)
    td = td.copy()
    if "loc" in policy.in_keys:
        td["loc"], td["scale"] = td["observation"][..., :2], td["observation"][..., 1:].exp()
    return policy(td)


def assert_close(ours, theirs):
    """The same keys in the same order, and values within two units in the last place."""
    assert keys(ours) == keys(theirs)
    for (key, a), (_, b) in zip(entries(ours), entries(theirs), strict=True):
        if not b.is_floating_point():
            assert torch.equal(a, b), key
            continue
        # loc + eps * scale and the sums of a log-probability cancel: their parts are about 1 to 4.
        # TanhNormal's score comes from the drawn value before the tanh here and through atanh
        # upstream, whose error is that of the action times the slope of atanh.
        assert_within_ulps(a, b, 2, magnitude=torch.tensor(4.0), where=str(key))


@pytest.fixture(params=[None, False, True], ids=["unset", "separate", "aggregate"])
def aggregate(request):
    with set_composite_lp_aggregate(request.param):
        yield request.param


# outputs --------------------------------------------------------------------------------------


# Upstream estimates TanhNormal's mean from 1000 draws, and its one-hot mean has a log-probability
# of another shape.
NOT_COMPARED = {("mean", "safe head"), ("mean", "tanh actor"), ("mean", "categorical actor")}


@EVERY_POLICY
@pytest.mark.parametrize("interaction", [None, *TYPES], ids=str)
def test_equal_outputs(name, interaction):
    ours, theirs = twins(POLICIES[name])
    td = data(6)
    with set_interaction_type(interaction):
        if (interaction, name) == ("mean", "composite actor"):
            with pytest.raises(NotImplementedError, match="has no log-probability"):
                call(ours, td)
            return
        result = call(ours, td)
        try:
            expected = call(theirs, td)
        except (NotImplementedError, RuntimeError):
            # TanhNormal's mode, medians of Independent, repeated values.
            assert interaction in ("mode", "median") or name == "samples"
            expected = None
    if name == "samples":
        assert result.batch_size == (2, 6)
    if expected is None or (interaction, name) in NOT_COMPARED:
        assert set(ours.out_keys) <= set(keys(result))
        assert all(value.isfinite().all() for _, value in entries(result))
    else:
        assert_close(result, expected)


@EVERY_POLICY
def test_equal_outputs_whatever_the_aggregate_switch_was(name, aggregate):
    ours, theirs = twins(POLICIES[name])
    td = data(6)
    with set_interaction_type("random"):
        assert_close(call(ours, td), call(theirs, td))


@EVERY_POLICY
def test_configuration_and_state_are_kept(name, aggregate):
    policy = POLICIES[name]().eval()
    heads = probabilistic(policy)
    modules = dict(policy.named_modules())
    parameters = dict(policy.named_parameters())
    names = list(policy.state_dict())
    was = [
        (type(m), {k: getattr(m, k) for k in CONFIGURATION if hasattr(m, k)}, m.__dict__.copy())
        for m in heads
    ]
    assert accelerate(policy) is policy
    assert list(policy.state_dict()) == names
    now = dict(policy.named_modules())
    assert list(now) == list(modules) and all(now[k] is modules[k] for k in now)
    assert all(p is parameters[k] for k, p in policy.named_parameters())
    for module, (cls, config, state) in zip(heads, was, strict=True):
        assert isinstance(module, cls) and isinstance(module, OURS)
        assert {k: getattr(module, k) for k in config} == config
        for key in ("distribution_kwargs", "default_interaction_type"):
            assert module.__dict__.get(key) is state.get(key)
        if not isinstance(module, tdnn.ProbabilisticTensorDictSequential):
            assert module.spec is state["_spec"] if "_spec" in state else True


def test_the_log_prob_keys_are_those_of_upstream_not_fastprobs_default():
    policy = accelerate(actor())
    assert policy.log_prob_keys == ["action_log_prob"]
    assert actor().log_prob_keys == policy.log_prob_keys
    assert fp.SafeProbabilisticModule(["loc", "scale"], ["action"]).log_prob_keys == [
        "sample_log_prob"
    ]


def test_a_switch_thrown_after_construction_still_raises():
    with set_composite_lp_aggregate(True):
        policy = actor()
    with set_composite_lp_aggregate(False):
        accelerate(policy)
        with pytest.raises(RuntimeError, match="composite_lp_aggregate"):
            policy(data(2))
    with set_composite_lp_aggregate(True):
        assert "sample_log_prob" in policy(data(2))


def test_generators_go_on_where_they_were():
    for generator in (7, torch.Generator().manual_seed(7)):
        ours, theirs = (actor(generator=copy.deepcopy(generator)) for _ in range(2))
        theirs.load_state_dict(ours.state_dict())
        td = data(4)
        with set_interaction_type("random"):
            for policy in (ours, theirs):
                policy(td.copy())
            held = ours[-1]._generator
            accelerate(ours)
            assert ours[-1].generator is held
            before = torch.get_rng_state()
            assert_close(ours(td.copy()), theirs(td.copy()))
            assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_key_is_read_and_written_back():
    ours, theirs = twins(functools.partial(actor, generator=("rng", "seed")))
    td = data()
    td["rng", "seed"] = torch.tensor(3)
    with set_interaction_type("random"):
        ours, theirs = ours(td.copy()), theirs(td.copy())
    assert_close(ours, theirs)
    assert ours["rng", "seed"] != 3


def test_keywords_that_are_parameters_stay_the_same_objects():
    kwargs = TensorDictParams(TensorDict(low=torch.full((2,), -2.0), high=torch.full((2,), 2.0)))
    make = functools.partial(
        actor, distribution_class=rlm.TanhNormal, distribution_kwargs=kwargs, safe=False
    )
    theirs = make()
    ours = copy.deepcopy(theirs)
    held = ours[-1].distribution_kwargs
    names = list(ours.state_dict())
    accelerate(ours)
    assert ours[-1].distribution_kwargs is held
    assert list(ours.state_dict()) == names == list(theirs.state_dict())
    td = data(3)
    assert_close(call(ours, td), call(theirs, td))


class Prior(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, loc):
        return D.Independent(D.Normal(loc, self.scale), 1)


def test_a_module_that_builds_the_distribution_stays_a_child():
    ours, theirs = twins(functools.partial(head, in_keys=["loc"], distribution_class=Prior()))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["distribution_class.scale"]
    td = data(3)
    assert_close(call(ours, td), call(theirs, td))


# classes --------------------------------------------------------------------------------------


def test_an_accelerated_actor_is_an_actor_still():
    policy = accelerate(actor())
    assert isinstance(policy, rlm.ProbabilisticActor)
    assert isinstance(policy, fp.SafeProbabilisticTensorDictSequential)
    assert isinstance(policy[-1], rlm.SafeProbabilisticModule)
    assert isinstance(policy[-1], fp.SafeProbabilisticModule)
    assert type(policy) is type(accelerate(actor()))
    assert type(accelerate(POLICIES["sequence"]())) is fp.ProbabilisticTensorDictSequential


@pytest.mark.parametrize("make", [actor, two_heads, POLICIES["safe head"]])
def test_copies_and_pickles(make):
    policy = accelerate(make())
    td = data(5)
    with set_interaction_type("random"):
        expected = call(policy, td)
        for twin in (copy.deepcopy(policy), copy.copy(policy), pickle.loads(pickle.dumps(policy))):
            assert type(twin) is type(policy) and twin is not policy
            assert [type(m) for m in twin.modules()] == [type(m) for m in policy.modules()]
            assert_close(call(twin, td), expected)


def test_a_pickle_opens_in_a_process_that_has_accelerated_nothing(tmp_path):
    path = tmp_path / "policy.pkl"
    path.write_bytes(pickle.dumps(accelerate(actor())))
    program = (
        "import pickle, sys, warnings; warnings.simplefilter('ignore')\n"
        "policy = pickle.load(open(sys.argv[1], 'rb'))\n"
        "import torchrl.modules as m, fastprob as fp\n"
        "assert isinstance(policy, (m.ProbabilisticActor)), type(policy)\n"
        "assert isinstance(policy[-1], fp.SafeProbabilisticModule), type(policy[-1])\n"
        "print(type(policy).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FastProbabilisticActor"


Child = type("Child", (type(accelerate(actor())),), {"__module__": __name__})


def test_a_subclass_of_an_accelerated_class_pickles_by_its_own_name():
    child = accelerate(actor())
    child.__class__ = Child
    assert type(copy.deepcopy(child)) is type(pickle.loads(pickle.dumps(child))) is Child


def test_slices_and_edits_of_an_accelerated_actor():
    policy = accelerate(actor())
    assert type(policy[:1]) is tdnn.TensorDictSequential
    part = policy[:]
    assert type(part) is fp.SafeProbabilisticTensorDictSequential
    td = data(3)
    assert_close(call(part, td), call(policy, td))
    policy[1] = head(out_keys=["other"])
    assert "other" in policy(data(2)) and "other" in policy.out_keys


def test_a_spec_set_before_is_kept_and_moving_keeps_it():
    policy = actor()
    policy.spec = rl.Composite(action=rl.Unbounded(2))
    accelerate(policy)
    assert policy.spec == rl.Composite(action=rl.Unbounded(2))
    fresh = accelerate(actor())
    fresh.to(torch.device("cpu"))
    assert fresh.spec["action"] is fresh[-1].spec["action"]


# hooks ----------------------------------------------------------------------------------------


def test_hooks_run_and_torchrls_projection_does_not():
    policy = actor()
    ran = []
    for module in (policy, policy[-1]):
        module.register_forward_pre_hook(lambda m, args: ran.append((m, "before")))
        module.register_forward_hook(lambda m, args, out: ran.append((m, out["action"].clone())))
    projection, user = policy[-1]._forward_hooks.values()
    assert projection.__name__ == "_forward_hook_safe_action"
    accelerate(policy)
    assert list(policy[-1]._forward_hooks.values()) == [user]
    action = policy(data(6))["action"]
    assert [m for m, _ in ran] == [policy, policy[-1], policy[-1], policy]
    assert all(torch.equal(ran[i][1], action) for i in (2, 3))
    assert action.abs().max() <= 0.5


def test_without_the_hook_nothing_is_projected():
    policy = actor()
    policy[-1]._forward_hooks.clear()
    ours = accelerate(copy.deepcopy(policy))
    assert ours[-1].safe is False
    td = data(64)
    with set_interaction_type("random"):
        result = call(ours, td)
        assert_close(result, call(policy, td))
    assert result["action"].abs().max() > 0.5


def test_a_hook_before_the_projection_leaves_the_module_alone():
    policy = actor()
    policy[-1].register_forward_hook(lambda m, args, out: None, prepend=True)
    hooks = list(policy[-1]._forward_hooks.items())
    _, report = accelerate(policy, return_report=True)
    assert [e.path for e in report.replaced] == [""]
    assert "runs before the projection" in report.left_alone[0].reason
    assert list(policy[-1]._forward_hooks.items()) == hooks
    assert type(policy[-1]) is rlm.SafeProbabilisticModule


# trees ----------------------------------------------------------------------------------------


def test_a_module_in_two_places_is_replaced_once():
    shared = head()
    root = nn.ModuleDict(
        {
            "a": tdnn.ProbabilisticTensorDictSequential(net(), shared),
            "b": tdnn.ProbabilisticTensorDictSequential(net(), shared),
        }
    )
    _, report = accelerate(root, return_report=True)
    assert [e.path for e in report.replaced] == ["a", "a.module.1", "b"]
    assert root["a"][-1] is root["b"][-1] is shared
    assert type(shared) is fp.ProbabilisticTensorDictModule


def test_an_actor_outside_the_children_of_a_loss():
    policy = actor()
    critic = rlm.ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    loss = ClipPPOLoss(policy, critic)
    names = list(loss.state_dict())
    assert policy not in list(loss.modules())
    _, report = accelerate(loss, return_report=True)
    assert {e.path for e in report.replaced} >= {"actor_network", "actor_network.module.1"}
    assert loss.actor_network is policy and isinstance(policy, OURS)
    assert list(loss.state_dict()) == names


class Holder(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)
        self.__dict__["me"] = [self, attributes]


def test_modules_in_lists_and_dictionaries_and_cycles():
    a, b, c = head(), head(), head()
    _, report = accelerate(Holder(x={"y": [a]}, z=(b,), m=c), return_report=True)
    assert {e.path for e in report.replaced} == {"x.y.0", "z.0", "m"}


def test_the_operators_of_an_actor_critic():
    ours, theirs = twins(POLICIES["actor-critic"])
    assert isinstance(ours.module[1], rlm.ProbabilisticActor)
    with set_interaction_type("random"):
        td = data(4)
        expected = call(theirs.get_policy_operator(), td)
        assert_close(call(ours.get_policy_operator(), td), expected)
        assert_close(call(accelerate(ours.get_policy_operator()), td), expected)


def test_an_optimiser_made_before_trains_the_accelerated_actor():
    policy = actor()
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
    accelerate(policy)
    td = data(8)
    before = [p.detach().clone() for p in policy.parameters()]
    with set_interaction_type("random"):
        policy(td)["action_log_prob"].mean().backward()
    optimiser.step()
    assert not any(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))


# what is left alone ---------------------------------------------------------------------------


class OwnDist(tdnn.ProbabilisticTensorDictModule):
    def get_dist(self, tensordict):
        return D.Independent(D.Normal(tensordict["loc"], 1e-3), 1)


class OwnForward(rlm.ProbabilisticActor):
    def forward(self, tensordict):
        return super().forward(tensordict).set("seen", tensordict["observation"])


class OwnPrivate(rlm.SafeProbabilisticModule):
    def _dist_sample(self, dist, **kwargs):
        return torch.zeros(dist.batch_shape + dist.event_shape)


class OwnPickle(rlm.ProbabilisticActor):
    def __reduce__(self):
        raise NotImplementedError


class Mixin:
    def log_prob(self, tensordict):
        return 0


class Mixed(Mixin, rlm.ProbabilisticActor):
    pass


class Configured(rlm.ProbabilisticActor):
    """Differs in its constructor, and in what fastprob's call leaves in force."""

    def __init__(self):
        super().__init__(net(), in_keys=["loc", "scale"], distribution_class=rlm.IndependentNormal)

    def __repr__(self):
        return "Configured()"

    def train(self, mode=True):
        self.trained = mode
        return super().train(mode)

    def extra(self):
        return "extra"


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: head(OwnDist), "OwnDist.get_dist"),
        (lambda: actor(OwnForward), "OwnForward.forward"),
        (lambda: head(OwnPrivate), "OwnPrivate._dist_sample"),
        (lambda: actor(OwnPickle), "OwnPickle.__reduce__"),
        (lambda: actor(Mixed), "Mixin.log_prob"),
    ],
)
def test_a_subclass_that_overrides_a_method_is_left_alone(make, named):
    policy = make()
    root, report = accelerate(nn.ModuleList([policy, head()]), return_report=True)
    (entry,) = [e for e in report.left_alone if e.path == "0"]
    assert named in entry.reason and entry.was is entry.now is type(policy)
    assert type(root[0]) is type(make())
    assert "1" in [e.path for e in report.replaced]


def test_a_method_overridden_on_the_object_leaves_it_alone():
    module = head()
    module.get_dist = lambda td: D.Normal(td["loc"], 1.0)
    with pytest.warns(UserWarning, match="overrides get_dist of this object"):
        accelerate(module)
    assert type(module) is tdnn.ProbabilisticTensorDictModule


def test_a_subclass_with_a_constructor_of_its_own_is_replaced():
    policy = accelerate(Configured())
    assert isinstance(policy, Configured) and isinstance(policy, OURS)
    assert repr(policy) == "Configured()" and policy.extra() == "extra"
    policy.eval()
    assert policy.trained is False and not policy[-1].training
    assert type(pickle.loads(pickle.dumps(policy))) is type(policy)
    torch.manual_seed(1)
    theirs = Configured()
    theirs.load_state_dict(policy.state_dict())
    td = data(3)
    assert_close(call(policy, td), call(theirs, td))


def test_torchrls_own_subclass_with_a_constructor_of_its_own():
    make = functools.partial(rlm.DreamerV3DiscreteActor, 12, 3, depth=1, num_cells=8)
    ours, theirs = twins(make)
    assert isinstance(ours, OURS)
    td = TensorDict(state=torch.randn(4, 8), belief=torch.randn(4, 4), batch_size=[4])
    results = []
    for policy in (ours, theirs):
        torch.manual_seed(0)
        results.append(policy(td.copy()))
    assert_close(*results)


def test_a_module_that_fastprob_cannot_run_is_left_as_it_was():
    module = head(rlm.SafeProbabilisticModule, spec=BOX, safe=True)
    module._spec["action"].space.low.fill_(2.0)  # above high
    state, hooks = dict(module.__dict__), dict(module._forward_hooks)
    with pytest.warns(UserWarning, match="ValueError: .*low"):
        accelerate(module)
    assert type(module) is rlm.SafeProbabilisticModule
    assert list(module.__dict__) == list(state)
    assert all(module.__dict__[k] is v for k, v in state.items())
    assert module._forward_hooks == hooks


# what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_the_second_time_there_is_nothing_to_replace(make):
    policy = accelerate(make())
    classes = [type(m) for m in policy.modules()]
    state = {k: v for k, v in policy.__dict__.items()}
    with pytest.warns(UserWarning, match="nothing to replace.*fastprob's already"):
        again, report = accelerate(policy, return_report=True)
    assert again is policy and not report.replaced
    assert len(report.left_alone) == len(probabilistic(policy))
    assert [type(m) for m in policy.modules()] == classes and policy.__dict__ == state


def test_nothing_probabilistic():
    module = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="this Linear: it has no probabilistic module"):
        assert accelerate(module) is module


@pytest.mark.parametrize("value", [None, actor, [nn.Linear(2, 2)]])
def test_what_is_no_module(value):
    with pytest.raises(TypeError, match=r"accelerate takes a torch\.nn\.Module, got"):
        accelerate(value)


def test_the_report_and_the_log_name_each_module(caplog):
    policy = tdnn.ProbabilisticTensorDictSequential(net(), head(OwnDist), head(out_keys=["b"]))
    with caplog.at_level(logging.INFO, logger="fastprob"):
        _, report = accelerate(policy, return_report=True)
    said = [
        "replaced the policy itself, ProbabilisticTensorDictSequential, by "
        "ProbabilisticTensorDictSequential",
        "replaced module.2, ProbabilisticTensorDictModule, by ProbabilisticTensorDictModule",
        "left alone module.1, OwnDist: it overrides OwnDist.get_dist",
    ]
    assert str(report).splitlines() == said
    assert [r.getMessage() for r in caplog.records] == [f"accelerate: {line}" for line in said]
    assert {r.name for r in caplog.records} == {"fastprob"}
    assert [e.now for e in report.replaced] == list(OURS[::-1])
    # The module that was left alone runs inside the new sequence as before.
    with set_interaction_type("mean"):
        assert torch.equal((td := policy(data(2)))["action"], td["loc"])


# compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_compiles_in_one_graph(safe):
    policy = accelerate(actor(safe=safe))
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    for interaction in ("random", "mode"):
        with set_interaction_type(interaction):
            grads = []
            for run in (policy, compiled):
                policy.zero_grad()
                torch.manual_seed(0)
                out = run(TensorDict(observation=torch.ones(4, 3), batch_size=[4]))
                (out["action"].sum() + out["action_log_prob"].sum()).backward()
                grads.append([out["action"], *(p.grad.clone() for p in policy.parameters())])
            torch.testing.assert_close(grads[1], grads[0])


def test_what_was_compiled_before_runs_the_new_class():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    policy = actor(safe=False)
    compiled = torch.compile(policy, backend=backend)
    td = data(4)
    with set_interaction_type("mode"):
        expected = compiled(td.copy())
        n = len(graphs)
        compiled(td.copy())
        assert len(graphs) == n
        accelerate(policy)
        result = compiled(td.copy())
    assert len(graphs) > n
    assert_close(result, expected)
