"""Soft actor-critic on Pendulum-v1.

Haarnoja et al., 2018 (arXiv:1812.05905): two Q networks, a temperature that is learned, and an
actor that draws by ``TanhNormal.rsample``, with TorchRL's SACLoss. The actor's head is upstream's
or fastprob's; all else is the same.

    python -m bench.loops.sac --impl fastprob

On a CPU it reaches a return of -250 within three minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import SACLoss, SoftUpdate

from bench.loops import common
from bench.loops.common import Flags, Returns, Run, Stopwatch


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters for Pendulum-v1."""

    env: str = "Pendulum-v1"
    envs: int = 8
    # An iteration is so many steps of each environment, and as many times ``updates``.
    steps: int = 25
    updates: int = 2
    iterations: int = 60
    # Iterations with actions at random, and no update.
    random: int = 5
    batch: int = 256
    buffer: int = 50_000
    learning_rate: float = 2e-3
    gamma: float = 0.98
    tau: float = 0.01
    # Rewards reach -16 a step; a tenth of them keeps the Q loss near 1.
    reward_scale: float = 0.1
    # Iterations that fill caches, compile and capture, and are not timed.
    burn_in: int = 8
    episodes: int = 50


class QNet(nn.Module):
    """Q(s, a), [rows, 1]."""

    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features + actions, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action], -1))


class Buffer:
    """The last transitions, in tensors that are written in a circle.

    Args:
        size: of the circle.
        device: of the tensors.
    """

    def __init__(self, size: int, device: str) -> None:
        self.size, self.device = size, device
        self.data: TensorDict | None = None
        self.added = 0

    def add(self, rows: TensorDict) -> None:
        """Adds rows, in place of the oldest."""
        if self.data is None:
            self.data = rows[:1].expand(self.size).clone()
        at = torch.arange(self.added, self.added + rows.shape[0], device=self.device) % self.size
        self.data[at] = rows
        self.added += rows.shape[0]

    def sample(self, rows: int) -> TensorDict:
        """Draws rows, with repetition."""
        assert self.data is not None
        filled = min(self.added, self.size)
        return self.data[torch.randint(filled, (rows,), device=self.device)]


def make_actor(flags: Flags, env: common.Environment) -> nn.Module:
    """An MLP, and the probabilistic module under comparison."""
    impl = flags.side
    features = env.observation.shape[-1]
    net = nn.Sequential(
        nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 2 * env.actions), NormalParamExtractor(),
    )  # fmt: skip
    head = impl.SafeProbabilisticModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        spec=impl.specs.Bounded(low=env.low, high=env.high, shape=(env.actions,)),
        distribution_class=impl.TanhNormal,
        distribution_kwargs={"low": env.low, "high": env.high},
        return_log_prob=False,
        default_interaction_type=InteractionType.RANDOM,
    )
    params = TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"])
    return impl.SafeProbabilisticTensorDictSequential(params, head).to(flags.device)


@torch.no_grad()
def collect(
    env: common.Environment,
    policy: Callable[[TensorDict], TensorDict] | None,
    buffer: Buffer,
    settings: Settings,
    returns: Returns,
) -> None:
    """Steps all environments once; without a policy, with uniform actions."""
    observation = env.observation
    if policy is None:
        assert env.low is not None and env.high is not None
        share = torch.rand(settings.envs, env.actions, device=observation.device)
        action = env.low + share * (env.high - env.low)
    else:
        with set_interaction_type(InteractionType.RANDOM):
            action = policy(TensorDict({"observation": observation}, [settings.envs]))["action"]
    following, reward, terminated, truncated = env.step(action)
    done = terminated | truncated
    returns.add(reward, done)
    buffer.add(
        TensorDict(
            {
                "observation": observation,
                "action": action,
                "next": {
                    "observation": following,
                    "reward": (reward * settings.reward_scale).unsqueeze(-1),
                    "done": done.unsqueeze(-1),
                    "terminated": terminated.unsqueeze(-1),
                },
            },
            batch_size=[settings.envs],
        )
    )


def train(settings: Settings, flags: Flags) -> Iterator[Run]:
    """Trains one policy, an iteration for each item that is taken, and evaluates it at the last.

    Args:
        settings: the hyper-parameters.
        flags: how it is run.

    Yields:
        the run as it stands.
    """
    begin = time.perf_counter()
    torch.manual_seed(flags.seed)
    env = common.make_env(settings.env, settings.envs, flags.seed, flags.device)
    actor = make_actor(flags, env)
    q = TensorDictModule(
        QNet(env.observation.shape[-1], env.actions).to(flags.device),
        in_keys=["observation", "action"],
        out_keys=["state_action_value"],
    )
    spec = Bounded(low=env.low, high=env.high, shape=(env.actions,), device=flags.device)
    loss = SACLoss(actor, q, action_spec=spec, alpha_init=0.2).to(flags.device)
    loss.make_value_estimator(gamma=settings.gamma)
    target = SoftUpdate(loss, eps=1 - settings.tau)
    losses_of = torch.compile(loss) if flags.compile else loss
    optimizer = torch.optim.Adam(
        [p for p in loss.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        fused=True,
        capturable=flags.device.startswith("cuda"),
    )

    def update(batch: TensorDict) -> TensorDict:
        losses = losses_of(batch)
        total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        target.step()
        return TensorDict({"loss": total.detach()})

    run_update = common.faster_update(update, flags)
    policy = common.faster_policy(actor, flags)
    watch, returns = Stopwatch(flags.device), Returns(settings.envs, flags.device)
    buffer = Buffer(settings.buffer, flags.device)
    run = Run("sac", settings.env, flags)
    for iteration in range(settings.iterations):
        watch.running = iteration >= settings.burn_in
        random = iteration < settings.random
        for _ in range(settings.steps):
            with watch("collection", settings.envs):
                collect(env, None if random else policy, buffer, settings, returns)
            if random:
                continue
            with watch("update", settings.updates):
                for _ in range(settings.updates):
                    run_update(buffer.sample(settings.batch))
        run.frames += settings.envs * settings.steps
        mean = returns.take()
        if mean is not None:
            run.steps.append(run.frames)
            run.returns.append(mean)
        yield run
    run.evaluation = common.evaluate(
        actor,
        settings.env,
        seed=1000 + flags.seed,
        device=flags.device,
        episodes=settings.episodes,
    )
    yield run.finish(watch, begin)


def main(argv: list[str] | None = None) -> Run:
    """Runs the loop from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    Flags.add_arguments(parser)
    parser.add_argument("--iterations", type=int)
    args = parser.parse_args(argv)
    settings = Settings()
    if args.iterations:
        settings = replace(settings, iterations=args.iterations)
    return common.run_alone(train(settings, Flags.of(args)))


if __name__ == "__main__":
    main()
