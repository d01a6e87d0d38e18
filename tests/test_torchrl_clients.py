"""TorchRL as a client: its actors, collectors and losses run fastprob's modules."""

from __future__ import annotations

import functools

import pytest
import torch
import torchrl.data as rl
import torchrl.modules as rlm
from tensordict import TensorDict
from tensordict import nn as tdnn
from tensordict.nn import set_composite_lp_aggregate
from torch import nn
from torchrl import objectives
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from torchrl.objectives.value import GAE

import fastprob as fp
from fastprob import accelerate, set_interaction_type
from fastprob import distributions as fpd
from tests._modules import entries, keys

OBS, ACT = 3, 2
LOW, HIGH = -2.0, 2.0
SPEC = rl.Bounded(LOW, HIGH, shape=(ACT,))

# Name of the family, TorchRL's class, fastprob's, keywords, and what the network gives.
FAMILIES = {
    "normal": (rlm.IndependentNormal, fpd.IndependentNormal, {}, "loc scale"),
    "tanh normal": (rlm.TanhNormal, fpd.TanhNormal, {"low": LOW, "high": HIGH}, "loc scale"),
    "truncated": (
        rlm.TruncatedNormal,
        fpd.TruncatedNormal,
        {"low": LOW, "high": HIGH},
        "loc scale",
    ),
    "one-hot": (rlm.OneHotCategorical, fpd.OneHotCategorical, {}, "logits"),
    "categorical": (torch.distributions.Categorical, fpd.Categorical, {}, "logits"),
}
CONTINUOUS = ["normal", "tanh normal"]


def network(params):
    if params == "logits":
        layers: list[nn.Module] = [nn.Linear(OBS, 4)]
    else:
        # Kept away from saturation, where TorchRL's score, through atanh of the rounded action, is
        # off by more than rounding of the result.
        layers = [
            nn.Linear(OBS, 2 * ACT),
            nn.Tanh(),
            rlm.NormalParamExtractor("biased_softplus_0.5"),
        ]
    return tdnn.TensorDictModule(
        nn.Sequential(*layers), in_keys=["observation"], out_keys=params.split()
    )


def spec_of(family):
    if family == "one-hot":
        return rl.OneHot(4)
    return rl.Categorical(4) if family == "categorical" else SPEC


def config(family, which, **kwargs):
    theirs, ours, keywords, params = FAMILIES[family]
    settled = {
        "in_keys": params.split(),
        "spec": spec_of(family),
        "distribution_class": ours if which == "fastprob" else theirs,
        "distribution_kwargs": keywords,
        "default_interaction_type": "random",
        "return_log_prob": True,
    }
    settled.update(kwargs)
    return settled


def upstream(family, **kwargs):
    torch.manual_seed(1)
    params = FAMILIES[family][3]
    return rlm.ProbabilisticActor(network(params), **config(family, "upstream", **kwargs))


def accelerated(family, **kwargs):
    return accelerate(upstream(family, **kwargs))


def built(family, **kwargs):
    """The actor as a user of fastprob builds it."""
    torch.manual_seed(1)
    head = fp.SafeProbabilisticModule(out_keys=["action"], **config(family, "fastprob", **kwargs))
    return fp.SafeProbabilisticTensorDictSequential(network(FAMILIES[family][3]), head)


def mixed(family, **kwargs):
    """TorchRL's actor with fastprob's distribution."""
    torch.manual_seed(1)
    params = FAMILIES[family][3]
    return rlm.ProbabilisticActor(network(params), **config(family, "fastprob", **kwargs))


ACTORS = {"built": built, "accelerated": accelerated, "mixed": mixed}
EVERY_ACTOR = pytest.mark.parametrize("make", ACTORS.values(), ids=ACTORS)


@pytest.fixture(params=[None, False, True], ids=["unset", "separate", "aggregate"])
def aggregate(request):
    """The switch: unset, as TorchRL's scripts set it, and as it once was by default."""
    with set_composite_lp_aggregate(request.param):
        yield request.param


def assert_close(ours, theirs):
    """The same entries in the same order, equal within rounding."""
    assert keys(ours) == keys(theirs)
    for (key, a), (_, b) in zip(entries(ours), entries(theirs), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


def renamed(td, make, aggregate):
    """`td` with the log-prob key that upstream gives: fastprob's differs where nothing is set."""
    if make is built and aggregate is None:
        # At the place of the other key, which keeps the order of entries.
        return TensorDict(
            {("action_log_prob" if k == "sample_log_prob" else k): v for k, v in td.items()},
            batch_size=td.batch_size,
        )
    return td


def log_prob_key(aggregate):
    """What upstream calls it."""
    return "sample_log_prob" if aggregate else "action_log_prob"


# actors ---------------------------------------------------------------------------------------


@EVERY_ACTOR
@pytest.mark.parametrize("family", FAMILIES)
def test_actors(make, family, aggregate):
    td = TensorDict(observation=torch.randn(16, OBS), batch_size=[16])
    results = []
    for actor in (make(family), upstream(family)):
        torch.manual_seed(0)
        results.append(actor(td.copy()))
    assert_close(renamed(results[0], make, aggregate), results[1])


@EVERY_ACTOR
@pytest.mark.parametrize("exploration", ExplorationType)
def test_exploration_types_are_interaction_types(make, exploration):
    actor, reference = make("normal"), upstream("normal")
    td = TensorDict(observation=torch.randn(16, OBS), batch_size=[16])
    calls = [
        (actor, set_exploration_type(exploration)),
        (actor, set_interaction_type(exploration.value)),
    ]
    # TorchRL's IndependentNormal has no median, fastprob's does.
    if exploration is not ExplorationType.MEDIAN:
        calls.append((reference, set_exploration_type(exploration)))
    actions = []
    for policy, switch in calls:
        torch.manual_seed(0)
        with switch:
            actions.append(policy(td.copy())["action"])
    torch.testing.assert_close(actions[0], actions[1], rtol=0, atol=0)
    torch.testing.assert_close(actions[0], actions[-1])
    distance = (actions[0] - reference(td.copy())["loc"]).abs().max()
    assert (distance > 0.01).item() is (exploration is ExplorationType.RANDOM)


# collectors -----------------------------------------------------------------------------------


class Drift(EnvBase):
    """The action, and what is left of the state, make the next state; ends after seven steps."""

    def __init__(self, action_spec):
        super().__init__()
        self.observation_spec = rl.Composite(
            observation=rl.Unbounded(OBS), step=rl.Unbounded(1, dtype=torch.int64)
        )
        self.action_spec = action_spec
        self.reward_spec = rl.Unbounded(1)

    def _reset(self, tensordict):
        return TensorDict(observation=torch.randn(OBS), step=torch.zeros(1, dtype=torch.int64))

    def _step(self, tensordict):
        force = tensordict["action"].float().sum(-1, keepdim=True).expand(OBS)
        step = tensordict["step"] + 1
        observation = 0.5 * tensordict["observation"] + 0.1 * force
        return TensorDict(
            observation=observation,
            step=step,
            reward=-observation.square().sum(-1, keepdim=True),
            done=step >= 7,
        )

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def collector_of(actor, family, frames, **kwargs):
    torch.manual_seed(0)
    return Collector(
        Drift(spec_of(family)),
        actor,
        frames_per_batch=frames,
        total_frames=2 * frames,
        # TorchRL 0.14 warns where it is left out.
        auto_register_policy_transforms=False,
        **kwargs,
    )


def collect(actor, family, frames=20, **kwargs):
    collector = collector_of(actor, family, frames, **kwargs)
    try:
        return torch.stack([batch.clone() for batch in collector])
    finally:
        collector.shutdown()


@EVERY_ACTOR
@pytest.mark.parametrize("family", ["normal", "tanh normal", "one-hot", "categorical"])
def test_a_collector(make, family, aggregate):
    ours, theirs = (collect(m(family), family) for m in (make, upstream))
    assert ours.batch_size == (2, 20)
    ours = renamed(ours, make, aggregate)
    assert set(keys(ours)) == set(keys(theirs))
    for key, value in entries(theirs):
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert ours["action"].float().std() > 0


@EVERY_ACTOR
def test_the_exploration_type_of_a_collector_rules(make):
    deterministic = ExplorationType.DETERMINISTIC
    for actor in (make("normal"), make("normal", default_interaction_type="mode")):
        data = collect(actor, "normal", exploration_type=deterministic)
        torch.testing.assert_close(data["action"], data["loc"], rtol=0, atol=0)
        data = collect(actor, "normal", exploration_type=ExplorationType.RANDOM)
        assert (data["action"] != data["loc"]).all()


def test_a_policy_accelerated_inside_a_running_collector(aggregate):
    actor, reference = upstream("tanh normal"), upstream("tanh normal")
    batches = []
    for policy in (actor, reference):
        collector = collector_of(policy, "tanh normal", 14)
        batch = iter(collector)
        seen = [next(batch).clone()]
        if policy is actor:
            accelerate(policy)
        seen.append(next(batch).clone())
        batches.append(torch.stack(seen))
        collector.shutdown()
    assert isinstance(actor, fp.SafeProbabilisticTensorDictSequential)
    torch.testing.assert_close(batches[0]["action"], batches[1]["action"])
    for key in ("action", log_prob_key(aggregate)):
        torch.testing.assert_close(batches[0][key], batches[1][key])


# losses ---------------------------------------------------------------------------------------


def value():
    torch.manual_seed(2)
    return rlm.ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"])


class Concatenate(nn.Module):
    def __init__(self, n_action):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(OBS + n_action, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def q_value(n_action=ACT):
    torch.manual_seed(3)
    return rlm.ValueOperator(Concatenate(n_action), in_keys=["observation", "action"])


def q_values():
    torch.manual_seed(3)
    return tdnn.TensorDictModule(nn.Linear(OBS, 4), ["observation"], ["action_value"])


LOSSES = {
    "ClipPPOLoss": lambda actor: objectives.ClipPPOLoss(actor, value()),
    "A2CLoss": lambda actor: objectives.A2CLoss(actor, value()),
    "ReinforceLoss": lambda actor: objectives.ReinforceLoss(actor, value()),
    "SACLoss": lambda actor: objectives.SACLoss(actor, q_value(), action_spec=SPEC),
    "SACLoss with a value network": lambda actor: objectives.SACLoss(
        actor, q_value(), value(), action_spec=SPEC
    ),
    "CQLLoss": lambda actor: objectives.CQLLoss(
        actor, q_value(), action_spec=SPEC, with_lagrange=True
    ),
    "IQLLoss": lambda actor: objectives.IQLLoss(actor, q_value(), value()),
    "DiscreteSACLoss": lambda actor: objectives.DiscreteSACLoss(
        actor, q_values(), action_space="one-hot", num_actions=4
    ),
}
ON_POLICY = ["ClipPPOLoss", "A2CLoss", "ReinforceLoss"]
CASES = [
    *((name, family) for name in ON_POLICY for family in FAMILIES),
    *((name, family) for name in LOSSES if name not in ON_POLICY for family in CONTINUOUS),
    ("DiscreteSACLoss", "one-hot"),
]
CASES = [c for c in CASES if c[0] != "DiscreteSACLoss" or c[1] == "one-hot"]


def gradients(loss, batch):
    """The entries of a loss, and the gradients of all its parameters by name."""
    torch.manual_seed(5)
    out = loss(batch)
    sum(v for k, v in out.items() if k.startswith("loss_")).backward()
    grads = {k: p.grad for k, p in loss.named_parameters() if p.grad is not None}
    return out.detach(), grads


@functools.cache
def rollout(family, aggregate):
    """A batch that upstream's actor has collected, with its advantage."""
    batch = collect(upstream(family), family)[0]
    GAE(gamma=0.9, lmbda=0.9, value_network=value())(batch)
    # A behaviour policy some steps back: the ratio is not 1 everywhere.
    key = log_prob_key(aggregate)
    batch[key] = batch[key] + 0.1 * torch.randn_like(batch[key])
    return batch.detach()


@pytest.mark.filterwarnings(
    # TorchRL says that nobody updates the target network; one forward and backward need none.
    "ignore:No target network updater has been associated:UserWarning"
)
@EVERY_ACTOR
@pytest.mark.parametrize("name, family", CASES)
def test_losses_and_gradients(name, family, make, aggregate):
    batch = rollout(family, aggregate)
    results = []
    for which in (make, upstream):
        loss = LOSSES[name](which(family))
        if name == "SACLoss" or name == "CQLLoss":
            loss.make_value_estimator(gamma=0.9)
        data = batch.clone()
        if which is built and aggregate is None and name == "ClipPPOLoss":
            # PPO asks the actor for its keys.
            assert loss.tensor_keys.sample_log_prob == "sample_log_prob"
            data.rename_key_("action_log_prob", "sample_log_prob")
        results.append(gradients(loss, data))
    (ours, our_grads), (theirs, their_grads) = results
    assert_close(ours, theirs)
    assert list(our_grads) == list(their_grads)
    assert any(k.startswith("actor_network_params") for k in our_grads)
    assert any(g.abs().max() > 1e-6 for k, g in our_grads.items() if k.startswith("actor"))
    for key, grad in their_grads.items():
        torch.testing.assert_close(our_grads[key], grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings("ignore:No target network updater has been associated:UserWarning")
@pytest.mark.parametrize(
    "name, family", [(n, "one-hot" if "Discrete" in n else "tanh normal") for n in LOSSES]
)
def test_a_loss_accelerated_after_construction(name, family, aggregate):
    batch = rollout(family, aggregate)
    results = []
    for which in ("ours", "theirs"):
        loss = LOSSES[name](upstream(family))
        names, params = list(loss.state_dict()), list(loss.parameters())
        if which == "ours":
            assert accelerate(loss) is loss
            assert isinstance(loss.actor_network, fp.SafeProbabilisticTensorDictSequential)
            assert isinstance(loss.actor_network, rlm.ProbabilisticActor)
            assert list(loss.state_dict()) == names
            assert all(a is b for a, b in zip(loss.parameters(), params, strict=True))
        results.append(gradients(loss, batch.clone()))
    (ours, our_grads), (theirs, their_grads) = results
    assert_close(ours, theirs)
    assert list(our_grads) == list(their_grads)
    for key, grad in their_grads.items():
        torch.testing.assert_close(our_grads[key], grad, msg=lambda text, key=key: f"{key}: {text}")


def test_stateful_networks_of_an_accelerated_loss_are_fastprobs():
    loss = accelerate(objectives.ClipPPOLoss(upstream("normal"), value()))
    actor = loss.get_stateful_net("actor_network")
    assert isinstance(actor, fp.SafeProbabilisticTensorDictSequential)
    td = TensorDict(observation=torch.randn(4, OBS), batch_size=[4])
    results = []
    for policy in (actor, upstream("normal")):
        torch.manual_seed(0)
        results.append(policy(td.copy()))
    assert_close(*results)
