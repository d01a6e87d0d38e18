"""One PPO run on Pendulum-v1, the same code for either actor.

Everything but the actor's probabilistic part is upstream's: TorchRL's environment wrapper, GAE and
ClipPPOLoss, and the MLPs. The clipped surrogate is that of Schulman et al., 2017
(arXiv:1707.06347). Episodes of Pendulum-v1 end by truncation after 200 steps, all at once, so that
a rollout is one episode of each environment, and nothing is reset in the middle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictModuleBase,
    set_interaction_type,
)
from torch import nn
from torchrl.envs import GymWrapper
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from bench.implementations import Implementation


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters; the defaults reach a return of about -180 in 90,000 steps."""

    envs: int = 32
    steps: int = 200
    iterations: int = 14
    epochs: int = 8
    minibatch: int = 800
    learning_rate: float = 4e-3
    gamma: float = 0.95
    lmbda: float = 0.95
    clip: float = 0.2
    max_grad_norm: float = 0.5
    # Rewards reach -16 a step; a tenth of them keeps the value loss near 1.
    reward_scale: float = 0.1


@dataclass
class Clock:
    """Accumulated CPU seconds of this process, by name.

    Not seconds at the clock: another process that takes the core for a while would be counted as
    work of whichever actor had its turn.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin

    def timed(self, name: str, function: Callable) -> Callable:
        """Returns the function with its time accumulated under a name."""

        def wrapper(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        return wrapper


class RolloutPolicy(TensorDictModuleBase):
    """Calls an actor under a clock, and lets a test nudge its actions."""

    def __init__(
        self,
        actor: nn.Module,
        clock: Clock,
        nudge: Callable[[TensorDictBase], None] | None = None,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys
        # In a list, so that the actor's parameters are not registered twice.
        self._actor = [actor]
        self._clock = clock
        self._nudge = nudge

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self._clock("rollout: actor"):
            tensordict = self._actor[0](tensordict)
        if self._nudge is not None:
            self._nudge(tensordict)
        return tensordict


def make_env(settings: Settings, seed: int) -> GymWrapper:
    """Returns the vectorised environment, all in this process."""
    env = GymWrapper(
        gymnasium.make_vec(
            "Pendulum-v1",
            num_envs=settings.envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED},
        )
    )
    env.set_seed(seed)
    return env


def _mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    layers.append(nn.Linear(64, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].weight.mul_(last_gain)
    return nn.Sequential(*layers)


def make_actor(impl: Implementation, env: GymWrapper) -> nn.Module:
    """Returns the actor: an MLP, and the probabilistic module under comparison.

    The torque is not squashed: Pendulum-v1 clips it itself, and the log-probability of the stored
    action is then exactly that of the drawn one.
    """
    net = nn.Sequential(_mlp(3, 2, last_gain=0.01), NormalParamExtractor())
    head = impl.SafeProbabilisticModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        spec=env.action_spec,
        distribution_class=impl.IndependentNormal,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    params = TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"])
    return impl.SafeProbabilisticTensorDictSequential(params, head)


def rollout(
    env: GymWrapper, policy: nn.Module, settings: Settings
) -> TensorDictBase:  # [envs, steps]
    """Collects one episode of each environment."""
    with torch.no_grad(), set_interaction_type(InteractionType.RANDOM):
        return env.rollout(settings.steps, policy, break_when_any_done=False)


def first_batch(
    impl: Implementation,
    seed: int,
    settings: Settings,
    nudge: Callable[[TensorDictBase], None] | None = None,
) -> TensorDictBase:
    """Collects the batch that a ``Trainer`` collects first, with its actions nudged where asked."""
    torch.manual_seed(seed)
    env = make_env(settings, seed)
    policy = RolloutPolicy(make_actor(impl, env), Clock(), nudge)
    torch.manual_seed(seed)
    batch = rollout(env, policy, settings)
    env.close()
    return batch


class Trainer:
    """Trains one policy, an iteration at a time.

    Two trainers may take turns: each keeps its own state of torch's generator, so that it draws
    what it would draw alone.

    Args:
        impl: whose probabilistic modules and distributions the actor is made of.
        seed: of torch's generator, and of the environments.
        settings: the hyper-parameters.

    Attributes:
        returns: the mean return of each iteration's episodes.
        clock: CPU seconds by part. "rollout: actor" is within "rollout", "update: actor" within
            "update".
        batch: the first collected batch.
    """

    def __init__(self, impl: Implementation, seed: int, settings: Settings) -> None:
        torch.manual_seed(seed)
        self.settings = settings
        self.clock = Clock()
        self.returns: list[float] = []
        self.batch: TensorDictBase | None = None
        self.env = make_env(settings, seed)
        actor = make_actor(impl, self.env)
        critic = TensorDictModule(
            _mlp(3, 1, last_gain=1.0), in_keys=["observation"], out_keys=["state_value"]
        )
        self.policy = RolloutPolicy(actor, self.clock)
        _time_get_dist(actor, self.clock)
        self.advantage = GAE(
            gamma=settings.gamma, lmbda=settings.lmbda, value_network=critic, average_gae=True
        )
        self.loss = ClipPPOLoss(
            actor,
            critic,
            clip_epsilon=settings.clip,
            entropy_coeff=1e-3,
            critic_coeff=0.5,
            # The actor itself is called, not a copy with swapped parameters: its clock sees it.
            functional=False,
        )
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), lr=settings.learning_rate, fused=True
        )
        # Again, so that the first batch does not depend on what was built: first_batch has no
        # critic.
        torch.manual_seed(seed)
        self._rng = torch.get_rng_state()

    def iterate(self) -> float:
        """Collects one episode per environment, updates, and returns the episodes' mean return."""
        settings = self.settings
        torch.set_rng_state(self._rng)
        for group in self.optimizer.param_groups:
            left = 1 - len(self.returns) / settings.iterations
            group["lr"] = settings.learning_rate * left
        with self.clock("rollout"):
            data = rollout(self.env, self.policy, settings)
        if self.batch is None:
            self.batch = data.clone()
        self.returns.append(data["next", "reward"].sum(1).mean().item())
        data["next", "reward"].mul_(settings.reward_scale)
        with self.clock("advantage"), torch.no_grad():
            self.advantage(data)
        with self.clock("update"):
            self._update(data)
        self._rng = torch.get_rng_state()
        return self.returns[-1]

    def _update(self, data: TensorDictBase) -> None:
        keys = ("observation", "action", "action_log_prob", "advantage", "value_target")
        flat: TensorDict = data.select(*keys).reshape(-1)
        for _ in range(self.settings.epochs):
            for index in torch.randperm(flat.shape[0]).split(self.settings.minibatch):
                losses = self.loss(flat[index])
                total = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
                self.optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.loss.parameters(), self.settings.max_grad_norm)
                self.optimizer.step()


def _time_get_dist(actor: nn.Module, clock: Clock) -> None:
    """Clocks what the loss asks of the actor: the distribution, its score and its entropy."""
    get_dist = actor.get_dist

    def timed(*args, **kwargs):
        with clock("update: actor"):
            dist = get_dist(*args, **kwargs)
        dist.log_prob = clock.timed("update: actor", dist.log_prob)
        dist.entropy = clock.timed("update: actor", dist.entropy)
        return dist

    actor.get_dist = timed
