"""Whole training steps as graphs, on the stand-in for a CPU and, where there is one, on a GPU."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn

import fastprob as fp
from fastprob.graphs import RecordingBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _no_argument_checks():
    """torch's checks of arguments look at values, which no graph can hold."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


def adam(parameters: Any, device: str, lr: float = 3e-3) -> torch.optim.Optimizer:
    """Adam as a graph needs it: its step number a tensor, its rate one that may be changed.

    On a CPU, which the stand-in captures, only the fused form keeps everything in tensors.
    """
    kwargs = {"capturable": True} if device == "cuda" else {"fused": True}
    return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), **kwargs)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


class PPO:
    """Actor, critic, and one update of both on a minibatch (Schulman et al., 2017)."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(mlp(3, 4), NormalParamExtractor())
        self.actor = fp.ProbabilisticTensorDictSequential(
            TensorDictModule(net, in_keys=["obs"], out_keys=["loc", "scale"]),
            fp.ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                distribution_class=fp.distributions.IndependentNormal,
                return_log_prob=True,
                default_interaction_type="random",
            ),
        ).to(device)
        self.critic = mlp(3, 1).to(device)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = adam(self.parameters, device)
        self.watch = [self.actor, self.critic, self.optimizer]

    def update(self, batch: TensorDict) -> TensorDict:
        self.optimizer.zero_grad()
        dist = self.actor.get_dist(batch.select("obs"))
        ratio = (dist.log_prob(batch["action"]) - batch["sample_log_prob"]).exp()
        advantage = batch["advantage"]
        clipped = ratio.clamp(0.8, 1.2)
        policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        value_loss = (self.critic(batch["obs"])[..., 0] - batch["target"]).square().mean()
        entropy = dist.entropy().mean()
        (policy_loss + 0.5 * value_loss - 1e-3 * entropy).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        losses = {"policy": policy_loss, "value": value_loss, "entropy": entropy, "norm": norm}
        return TensorDict(losses).detach()

    def batch(self, device: str) -> TensorDict:
        with torch.no_grad():
            data = self.actor(TensorDict(obs=torch.randn(32, 3, device=device), batch_size=[32]))
        data["advantage"] = torch.randn(32, device=device)
        data["target"] = torch.randn(32, device=device)
        return data.select("obs", "action", "sample_log_prob", "advantage", "target")


class SAC:
    """Actor, two critics, their targets and the temperature (Haarnoja et al., 2018)."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(mlp(3, 4), NormalParamExtractor())
        self.actor = fp.ProbabilisticTensorDictSequential(
            TensorDictModule(net, in_keys=["obs"], out_keys=["loc", "scale"]),
            fp.ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                distribution_class=fp.distributions.TanhNormal,
                return_log_prob=True,
                default_interaction_type="random",
            ),
        ).to(device)
        self.critics = nn.ModuleList([mlp(5, 1) for _ in range(2)]).to(device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.optimizers = [
            adam(self.critics.parameters(), device),
            adam(self.actor.parameters(), device),
            adam([self.log_alpha], device),
        ]
        self.watch = [self.actor, self.critics, self.targets, *self.optimizers]
        self.parameters = [
            *self.actor.parameters(),
            *self.critics.parameters(),
            *self.targets.parameters(),
            self.log_alpha,
        ]

    def values(self, critics: nn.ModuleList, obs: torch.Tensor, action: torch.Tensor) -> Any:
        return torch.stack([q(torch.cat([obs, action], -1))[..., 0] for q in critics])

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        td = self.actor(TensorDict(obs=obs, batch_size=obs.shape[:1]))
        return td["action"], td["sample_log_prob"]

    def update(self, batch: TensorDict) -> TensorDict:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            action, score = self.act(batch["next_obs"])
            value = self.values(self.targets, batch["next_obs"], action).amin(0) - alpha * score
            target = batch["reward"] + 0.99 * torch.where(batch["done"], 0.0, value)
        values = self.values(self.critics, batch["obs"], batch["action"])
        critic_loss = (values - target).square().mean()
        critic_loss.backward()
        self.optimizers[0].step()
        action, score = self.act(batch["obs"])
        self.critics.requires_grad_(False)
        actor_loss = (
            alpha * score - self.values(self.critics, batch["obs"], action).amin(0)
        ).mean()
        actor_loss.backward()
        self.critics.requires_grad_(True)
        self.optimizers[1].step()
        alpha_loss = -(self.log_alpha * (score.detach() - 2.0)).mean()
        alpha_loss.backward()
        self.optimizers[2].step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.targets.parameters()), list(self.critics.parameters()), 0.05
            )
        return TensorDict(critic=critic_loss, actor=actor_loss, alpha=alpha_loss).detach()

    def batch(self, device: str) -> TensorDict:
        return TensorDict(
            obs=torch.randn(32, 3, device=device),
            next_obs=torch.randn(32, 3, device=device),
            action=torch.rand(32, 2, device=device) * 2 - 1,
            reward=torch.randn(32, device=device),
            done=torch.rand(32, device=device) < 0.1,
            batch_size=[32],
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [PPO, SAC])
def test_an_update_is_that_of_the_function(make, device):
    """Losses, parameters, moments and the random state after twelve updates, nine by replay."""
    ours, theirs = make(device), make(device)
    batches = [theirs.batch(device) for _ in range(12)]
    backend = RecordingBackend() if device == "cpu" else None
    step = fp.CudaGraphStep(ours.update, watch=ours.watch, backend=backend)
    before = [p.detach().clone() for p in ours.parameters]
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.manual_seed(1)
    expected = [theirs.update(batch) for batch in batches]
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for i, batch in enumerate(batches):
        losses = step(batch)
        for key, value in expected[i].items():
            torch.testing.assert_close(losses[key], value, **exact)
    assert torch.equal(torch.get_rng_state(), after)
    for a, b, start in zip(ours.parameters, theirs.parameters, before, strict=True):
        torch.testing.assert_close(a, b, **exact)
        assert not torch.equal(a, start)
    for a, b in zip(ours.watch, theirs.watch, strict=True):
        if isinstance(a, torch.optim.Optimizer):
            for mine, other in zip(a.state.values(), b.state.values(), strict=True):
                torch.testing.assert_close(mine, other, **exact)
                assert mine["step"].item() == 12
    assert [(g.captured, g.replays) for g in step.graphs] == [(True, 9)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_rate_changes_in_place_and_a_number_takes_a_new_graph(device):
    for fixed in (False, True):
        p, q = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
        lr = 0.1 if fixed else torch.tensor(0.1, device=device)
        kwargs = {"capturable": True} if device == "cuda" else {"fused": True}
        if fixed and device == "cpu":
            kwargs["fused"] = True
        mine = torch.optim.Adam([p], lr=lr, **kwargs)
        other = torch.optim.Adam([q], lr=lr if fixed else lr.clone(), **kwargs)

        def update(x, optimizer=mine, parameter=p):
            optimizer.zero_grad()
            (parameter * x).square().sum().backward()
            optimizer.step()

        backend = RecordingBackend() if device == "cpu" else None
        step = fp.CudaGraphStep(update, watch=mine, backend=backend)  # type: ignore[arg-type]
        x = torch.full((3,), 0.5, device=device)
        for i in range(9):
            if i == 6:
                for optimizer in (mine, other):
                    if fixed:
                        optimizer.param_groups[0]["lr"] = 0.01
                    else:
                        optimizer.param_groups[0]["lr"].fill_(0.01)
            step(x)
            update(x, other, q)
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert len(step.graphs) == 1
        assert step.graphs[0].replays == (3 if fixed else 6)
        if backend is not None:
            assert backend.captures == (2 if fixed else 1)


def sgd_step(**kwargs: Any) -> tuple[nn.Linear, Any, fp.CudaGraphStep, RecordingBackend]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def update(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    backend = RecordingBackend()
    step = fp.CudaGraphStep(update, watch=[net, optimizer], backend=backend, **kwargs)
    return net, optimizer, step, backend


MOVES = {
    "assigned parameters": lambda net, optimizer: net.load_state_dict(
        {k: v * 0.5 for k, v in net.state_dict().items()}, assign=True
    ),
    "a moved parameter": lambda net, optimizer: setattr(
        net.weight, "data", net.weight.data.clone() * 0.5
    ),
    "a loaded optimizer": lambda net, optimizer: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
    "a momentum": lambda net, optimizer: optimizer.param_groups[0].update(momentum=0.5),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_has_moved_is_captured_anew(name):
    net, optimizer, step, backend = sgd_step()
    twin, twin_optimizer, _, _ = sgd_step()
    x = torch.randn(5, 3)

    def by_hand():
        twin_optimizer.zero_grad()
        loss = twin(x).square().mean()
        loss.backward()
        twin_optimizer.step()
        return loss.detach()

    for i in range(8):
        if i == 5:
            MOVES[name](net, optimizer)
            MOVES[name](twin, twin_optimizer)
            if name == "assigned parameters":
                # The optimizer goes on with the parameters that it knows, in either case.
                assert optimizer.param_groups[0]["params"][0] is not net.weight
        assert torch.equal(step(x), by_hand()), i
    assert backend.captures == 2
    assert torch.equal(net.weight, twin.weight)


def test_the_first_calls_are_real_and_eager():
    net, _, step, backend = sgd_step(warmup=2)
    weights = [net.weight.clone()]
    for i in range(5):
        step(torch.ones(1, 3))
        weights.append(net.weight.clone())
        assert [g.captured for g in step.graphs] == [i >= 2]
        assert backend.captures == (i >= 2)
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 6
    # Each kind of call has its own first ones.
    step(torch.ones(2, 3))
    assert [g.captured for g in step.graphs] == [True, False]
    step.reset()
    assert step.graphs == []


def test_repeat_looks_up_once_and_counts_every_call():
    calls = []
    state = torch.zeros(2)

    def function(x):
        calls.append(1)
        state.add_(x)
        return state.clone()

    backend = RecordingBackend()
    step = fp.CudaGraphStep(function, backend=backend)
    # Three eager calls, one that is captured and replayed, and six replays.
    assert step.repeat(10, torch.ones(2)).tolist() == [10.0, 10.0]
    assert len(calls) == 4
    assert step.repeat(2, torch.full((2,), 5.0)).tolist() == [20.0, 20.0]
    assert step.repeat(1, torch.ones(2)).tolist() == [21.0, 21.0]
    assert len(calls) == 4
    assert fp.CudaGraphStep(function).repeat(2, torch.ones(2)).tolist() == [23.0, 23.0]
    with pytest.raises(ValueError, match="times must be 1 or more, got 0"):
        step.repeat(0, torch.ones(2))


Pair = namedtuple("Pair", ["first", "second"])


def test_arguments_and_results_of_all_kinds():
    def function(pair, *, options, td, scale):
        total = pair.first + pair.second * scale
        out = td.copy().set("sum", total + td["a", "b"])
        return {"pair": Pair(total, (None, "text")), "td": out, "list": [options["x"] * 2]}

    backend = RecordingBackend()
    step = fp.CudaGraphStep(function, backend=backend, warmup=1)
    for scale in (2, 3, 2, 3, 2.0):
        for _ in range(2):
            arguments = {
                "options": {"x": torch.randn(3)},
                "td": TensorDict({("a", "b"): torch.randn(2)}, batch_size=[2]),
                "scale": scale,
            }
            pair = Pair(torch.randn(2), torch.randn(2))
            theirs = function(pair, **arguments)
            ours = step(pair, **arguments)
            assert type(ours["pair"]) is Pair
            assert torch.equal(ours["pair"].first, theirs["pair"].first)
            assert ours["pair"].second == (None, "text")
            assert torch.equal(ours["td"]["sum"], theirs["td"]["sum"])
            assert torch.equal(ours["td"]["a", "b"], arguments["td"]["a", "b"])
            assert torch.equal(ours["list"][0], theirs["list"][0])
    assert backend.captures == 3


def test_arguments_that_a_function_writes_to():
    def function(x):
        x.mul_(2)

    step = fp.CudaGraphStep(function, backend=RecordingBackend(), warmup=1)
    x = torch.ones(2)
    for i in range(1, 5):
        assert step(x) is None
        assert x.tolist() == [2.0**i] * 2


def test_results_last_unless_they_are_handed_over():
    for clone in (True, False):
        step = fp.CudaGraphStep(
            lambda x: x + 1, backend=RecordingBackend(), warmup=1, clone_outputs=clone
        )
        step(torch.zeros(2))
        first, second = step(torch.zeros(2)), step(torch.ones(2))
        assert first.tolist() == ([1.0, 1.0] if clone else [2.0, 2.0])
        assert (first.data_ptr() == second.data_ptr()) is not clone


def test_a_wait_for_the_device_is_named_and_the_step_was_made():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def update(x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        if loss.item() < 1e9:
            optimizer.step()

    step = fp.CudaGraphStep(update, watch=[net, optimizer], backend=RecordingBackend())
    for _ in range(3):
        before = net.weight.clone()
        step(torch.ones(2, 3))
        assert not torch.equal(net.weight, before)
    before = net.weight.clone()
    for _ in range(2):
        with pytest.raises(
            fp.GraphError,
            match=r"update cannot be captured.*_local_scalar_dense.*test_training_graph\.py",
        ):
            step(torch.ones(2, 3))
    assert torch.equal(net.weight, before)
    step.enabled = False
    step(torch.ones(2, 3))
    assert not torch.equal(net.weight, before)


def test_what_is_refused():
    net, _, step, _ = sgd_step(warmup=1)
    step(torch.ones(2, 3))
    with pytest.raises(fp.GraphError, match=r"argument 0 of update .*requires a gradient"):
        for _ in range(2):
            step(torch.ones(2, 3, requires_grad=True))

    step = fp.CudaGraphStep(lambda x: net(x), backend=RecordingBackend(), warmup=1)
    step(torch.ones(2, 3))
    with pytest.raises(fp.GraphError, match="result of <lambda> requires a gradient"):
        step(torch.ones(2, 3))

    step = fp.CudaGraphStep(lambda x, y: x, backend=RecordingBackend(), warmup=1)
    step(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(fp.GraphError, match=r"argument 1 \(of shape \(2,\)\) is on meta"):
        step(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="an argument of type set cannot be part"):
        step(torch.ones(2), {3})
    with pytest.raises(TypeError, match="function must be callable"):
        fp.CudaGraphStep(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="watch takes modules and optimizers, got a int"):
        fp.CudaGraphStep(lambda: None, watch=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="warmup must be an int of 1 or more"):
        fp.CudaGraphStep(lambda: None, warmup=0)
    with pytest.raises(ValueError, match="max_graphs must be an int of 1 or more"):
        fp.CudaGraphStep(lambda: None, max_graphs=0)


def test_an_optimizer_must_be_capturable_on_a_gpu():
    class LikeCuda(RecordingBackend):
        capturable = True

    net = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    step = fp.CudaGraphStep(lambda x: None, watch=[optimizer], backend=LikeCuda(), warmup=1)
    step(torch.ones(1))
    with pytest.raises(fp.GraphError, match="an optimizer Adam that was built without capturable"):
        step(torch.ones(1))


def test_a_policy_in_graphs_is_part_of_the_step():
    """A rollout's policy may be the actor that the step trains."""
    ppo, other = PPO("cpu"), PPO("cpu")
    policy = fp.CudaGraphPolicy(ppo.actor, backend=RecordingBackend())
    step = fp.CudaGraphStep(ppo.update, watch=ppo.watch, backend=RecordingBackend())
    obs = torch.randn(8, 3)
    for _ in range(6):
        with torch.no_grad():
            torch.manual_seed(2)
            ours = policy(TensorDict(obs=obs, batch_size=[8]))
            torch.manual_seed(2)
            theirs = other.actor(TensorDict(obs=obs, batch_size=[8]))
        assert torch.equal(ours["action"], theirs["action"])
        torch.manual_seed(3)
        batch = other.batch("cpu")
        step(batch)
        other.update(batch)
    assert policy.graphs[0].replays == 6


def test_no_reference_cycle():
    _, _, step, _ = sgd_step()
    for _ in range(6):
        step(torch.ones(2, 3))
    (entry,) = step._table.entries.values()
    gone = [weakref.ref(step), weakref.ref(entry.static[0])]
    gc.disable()
    try:
        del step, entry
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
